"""Operations that move numbers and compute none, in ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.table import NoFormError, Out, entry
from dgfast.runtimes.onnx.values import Batch, Value, elements

aten = torch.ops.aten


@entry(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
def _reshape(g: OnnxGraph, out: Out, x: Value, *_: Any) -> Value:
    return g.reshape(x, out.shape)


@entry(aten.permute.default)
def _permute(g: OnnxGraph, out: Out, x: Value, order: list[int]) -> Value:
    return g.transpose(x, [i % len(x.shape) for i in order])


@entry(aten.transpose.int)
def _transpose(g: OnnxGraph, out: Out, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return g.transpose(x, order)


@entry(aten.t.default)
def _t(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.transpose(x, list(range(len(x.shape)))[::-1])


@entry(aten.expand.default)
def _expand(g: OnnxGraph, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return g.expand(x, out.shape)


@entry(aten.repeat.default)
def _tile(g: OnnxGraph, out: Out, x: Value, repeats: list[int]) -> Value:
    full = g.reshape(x, (*[1] * (len(repeats) - len(x.shape)), *x.shape))
    return g.emit("Tile", [full, g.constant(repeats, np.int64)], [out.shape], out.dtype)[0]


@entry(aten.cat.default)
def _cat(g: OnnxGraph, out: Out, parts: Sequence[Value], dim: int = 0) -> Value:
    return g.emit("Concat", [g.cast(p, out.dtype) for p in parts], [out.shape], out.dtype, axis=dim)[0]


@entry(aten.stack.default)
def _stack(g: OnnxGraph, out: Out, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(out.shape)
    one = tuple(1 if i == dim else d for i, d in enumerate(out.shape))
    return g.emit("Concat", [g.reshape(p, one) for p in parts], [out.shape], out.dtype, axis=dim)[0]


@entry(aten.split.Tensor, aten.split_with_sizes.default)
def _split(g: OnnxGraph, out: Out, x: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    whole = elements([x.shape[dim]])
    sizes = [min(size, whole - at) for at in range(0, whole, size)] if isinstance(size, int) else list(size)
    shapes = [tuple(s if i == dim % len(x.shape) else d for i, d in enumerate(x.shape)) for s in sizes]
    return g.emit("Split", [x, g.constant(sizes, np.int64)], shapes, out.dtype, axis=dim)


@entry(aten.unbind.int)
def _unbind(g: OnnxGraph, out: Out, x: Value, dim: int = 0) -> tuple[Value, ...]:
    parts = _split(g, out, x, 1, dim)
    dim %= len(x.shape)
    return tuple(g.reshape(part, x.shape[:dim] + x.shape[dim + 1 :]) for part in parts)


@entry(aten.slice.Tensor)
def _slice(g: OnnxGraph, out: Out, x: Value, dim: int = 0, start: Any = 0, end: Any = None, step: int = 1) -> Value:
    if x.shape == out.shape and step == 1:
        return x
    last = 2**63 - 1 if end is None or isinstance(end, Batch) else end
    bounds = [g.constant([v], np.int64) for v in (start or 0, last, dim, step)]
    return g.emit("Slice", [x, *bounds], [out.shape], out.dtype)[0]


@entry(aten.flip.default)
def _flip(g: OnnxGraph, out: Out, x: Value, dims: list[int]) -> Value:
    bounds = [g.constant([v] * len(dims), np.int64) for v in (-1, -(2**63) + 1)]
    steps = g.constant([-1] * len(dims), np.int64)
    return g.emit("Slice", [x, *bounds, g.constant(dims, np.int64), steps], [out.shape], out.dtype)[0]


@entry(aten.select.int)
def _select(g: OnnxGraph, out: Out, x: Value, dim: int, index: int) -> Value:
    return g.emit("Gather", [x, g.constant(index, np.int64)], [out.shape], out.dtype, axis=dim)[0]


@entry(aten.slice_backward.default)
def _slice_backward(
    g: OnnxGraph, out: Out, grad: Value, sizes: Any, dim: int, start: int, end: int, step: int
) -> Value:
    if step != 1:
        raise NoFormError("the gradient of a slice with a step")
    return _pad(g, grad, out.shape, dim, start)


@entry(aten.select_backward.default)
def _select_backward(g: OnnxGraph, out: Out, grad: Value, sizes: Any, dim: int, index: int) -> Value:
    one = tuple(1 if i == dim % len(out.shape) else d for i, d in enumerate(out.shape))
    return _pad(g, g.reshape(grad, one), out.shape, dim, index)


def _pad(g: OnnxGraph, x: Value, shape: Any, dim: int, start: int) -> Value:
    """x at position `start` of zeros, in one dimension."""
    if x.shape == shape:
        return x
    dim %= len(shape)
    whole, size = elements([shape[dim]]), elements([x.shape[dim]])
    first = start % whole
    before, after = ([n if i == dim else 0 for i in range(len(shape))] for n in (first, whole - first - size))
    return g.emit("Pad", [x, g.constant(before + after, np.int64)], [shape], x.dtype)[0]


@entry(aten.constant_pad_nd.default)
def _constant_pad(g: OnnxGraph, out: Out, x: Value, pad: list[int], value: float = 0) -> Value:
    rank, pairs = len(x.shape), list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    full = [(0, 0)] * (rank - len(pairs)) + pairs
    sizes = g.constant([a for a, _ in full] + [b for _, b in full], np.int64)
    return g.emit("Pad", [x, sizes, g.constant(value, x.dtype)], [out.shape], x.dtype)[0]
