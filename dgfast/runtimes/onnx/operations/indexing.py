"""Numbers picked out by indices and put there, sorted, or the largest of them, in ONNX.

Indices may be negative, in torch as in ONNX.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.sums import index_of
from dgfast.runtimes.onnx.operations.table import TABLE, Entry, NoFormError, Out, entry
from dgfast.runtimes.onnx.values import Shape, Value, broadcast, elements

aten = torch.ops.aten

_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


@entry(aten.index_select.default)
def _index_select(g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value) -> Value:
    return g.emit("Gather", [x, indices], [out.shape], out.dtype, axis=dim)[0]


@entry(aten.gather.default)
def _gather(g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value, **_: Any) -> Value:
    return g.emit("GatherElements", [x, indices], [out.shape], out.dtype, axis=dim)[0]


@entry(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(g: OnnxGraph, out: Out, x: Value, indices: Sequence[Value | None]) -> Value:
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    picked = [index for index in indices if index is not None]
    if any(index.dtype is np.bool_ for index in picked):
        raise NoFormError("indexing by a mask, whose result has no size that is known beforehand: use torch.where")
    if len(dims) == 1:
        return g.emit("Gather", [x, picked[0]], [out.shape], out.dtype, axis=dims[0])[0]
    front, order = _to_front(g, x, dims)
    stacked, shape = _stacked(g, picked)
    rest = [x.shape[dim] for dim in order[len(dims) :]]
    (found,) = g.emit("GatherND", [front, stacked], [(*shape, *rest)], out.dtype)
    if dims != list(range(dims[0], dims[0] + len(dims))):
        return found  # indices apart from one another have their sizes in front
    count, before = len(shape), dims[0]
    places = [*range(count, count + before), *range(count), *range(count + before, count + len(rest))]
    return g.transpose(found, places)


@entry(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(
    g: OnnxGraph, out: Out, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False,
    *_: Any,
) -> Value:  # fmt: skip
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    picked = [index for index in indices if index is not None]
    if any(index.dtype is np.bool_ for index in picked):
        raise NoFormError("writing by a mask: use torch.where")
    front, order = _to_front(g, x, dims)
    stacked, shape = _stacked(g, picked)
    rest = [x.shape[dim] for dim in order[len(dims) :]]
    before = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    full = g.expand(values, (*rest[:before], *shape, *rest[before:]))
    moved = [*range(before, before + len(shape)), *range(before), *range(before + len(shape), len(full.shape))]
    how = {"reduction": "add"} if accumulate else {}
    updates = g.transpose(full, moved)
    (written,) = g.emit("ScatterND", [front, stacked, updates], [front.shape], out.dtype, **how)
    return g.transpose(written, [order.index(dim) for dim in range(len(order))])


def _to_front(g: OnnxGraph, x: Value, dims: list[int]) -> tuple[Value, list[int]]:
    """x with these dimensions first, and where each of its dimensions was."""
    order = [*dims, *(dim for dim in range(len(x.shape)) if dim not in dims)]
    return g.transpose(x, order), order


def _stacked(g: OnnxGraph, indices: Sequence[Value]) -> tuple[Value, Shape]:
    """Indices as one tensor with a last dimension for those that belong together, and their common shape."""
    shape: Shape = ()
    for index in indices:
        shape = broadcast(shape, index.shape)
    wide = [g.reshape(g.expand(g.cast(index, np.int64), shape), (*shape, 1)) for index in indices]
    if len(wide) == 1:
        return wide[0], shape
    return g.emit("Concat", wide, [(*shape, len(wide))], np.int64, axis=len(shape))[0], shape


# Written along one dimension ------------------------------------------------------------------------------------------
@entry(aten.scatter.src)
def _scatter(g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value, source: Value) -> Value:
    return _scattered(g, x, dim, indices, source, "none")


@entry(aten.scatter.value)
def _scatter_value(g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value, value: float) -> Value:
    return _scattered(g, x, dim, indices, g.expand(g.constant(value, out.dtype), indices.shape), "none")


@entry(aten.scatter_add.default)
def _scatter_add(g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value, source: Value) -> Value:
    return _scattered(g, x, dim, indices, source, "add")


@entry(aten.scatter_reduce.two)
def _scatter_reduce(
    g: OnnxGraph, out: Out, x: Value, dim: int, indices: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    if reduce not in _REDUCTIONS or not include_self:
        raise NoFormError(f"scatter_reduce by {reduce}" + ("" if include_self else " without what was there before"))
    return _scattered(g, x, dim, indices, source, _REDUCTIONS[reduce])


def _scattered(g: OnnxGraph, x: Value, dim: int, indices: Value, source: Value, reduction: str) -> Value:
    if not x.shape:
        return source
    for axis, (most, size) in enumerate(zip(source.shape, indices.shape, strict=True)):
        if most != size:  # torch reads the beginning of a source that is larger than the indices
            bounds = [g.constant([v], np.int64) for v in (0, size, axis)]
            shape = (*source.shape[:axis], size, *source.shape[axis + 1 :])
            (source,) = g.emit("Slice", [source, *bounds], [shape], source.dtype)
    inputs = [x, indices, g.cast(source, x.dtype)]
    return g.emit("ScatterElements", inputs, [x.shape], x.dtype, axis=dim, reduction=reduction)[0]


# In order of size -----------------------------------------------------------------------------------------------------
@entry(aten.topk.default)
def _topk(
    g: OnnxGraph, out: Out, x: Value, k: int, dim: int = -1, largest: bool = True, ordered: bool = True
) -> tuple[Value, ...]:
    shape = tuple(k if axis == dim % len(x.shape) else size for axis, size in enumerate(x.shape))
    inputs, options = [x, g.constant([k], np.int64)], {"axis": dim, "largest": int(largest), "sorted": int(ordered)}
    return g.emit("TopK", inputs, [shape, shape], [x.dtype, np.int64], **options)


@entry(aten.sort.default)
def _sort(g: OnnxGraph, out: Out, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, ...]:
    return _topk(g, out, x, elements([x.shape[dim]]), dim, descending)


@entry(aten.sort.stable)
def _stable_sort(
    g: OnnxGraph, out: Out, x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, ...]:
    return _sort(g, out, x, dim, descending)


@entry(aten.kthvalue.default)
def _kthvalue(g: OnnxGraph, out: Out, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Value, ...]:
    results, last = _topk(g, out, x, k, dim, largest=False), g.constant(k - 1, np.int64)
    kept = [g.emit("Gather", [y, last], [_without(y.shape, dim)], y.dtype, axis=dim)[0] for y in results]
    return tuple(g.reshape(y, out.shape) for y in kept)


@entry(aten.median.dim)
def _median(g: OnnxGraph, out: Out, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, ...]:
    return _kthvalue(g, out, x, (elements([x.shape[dim]]) + 1) // 2, dim, keepdim)


def _extreme(op: str) -> Entry:
    def find(g: OnnxGraph, out: Out, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        return g.reduce(f"Reduce{op}", x, [dim], keepdim), index_of(g, f"Arg{op}", x, dim, out.shape, keepdim)

    return find


TABLE |= {aten.max.dim: _extreme("Max"), aten.min.dim: _extreme("Min")}


def _without(shape: Shape, dim: int) -> Shape:
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]
