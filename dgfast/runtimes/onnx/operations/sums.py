"""Sums, extremes and softmax, with its gradient, in ONNX."""

import math
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.table import TABLE, Entry, NoFormError, Out, entry
from dgfast.runtimes.onnx.values import Value, elements

aten = torch.ops.aten


def _reduction(op: str) -> Entry:
    def reduce(g: OnnxGraph, out: Out, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> Value:
        axes = [axes] if isinstance(axes, int) else axes or range(len(x.shape))
        return g.reduce(op, g.cast(x, out.dtype), list(axes), keepdim)

    return reduce


TABLE |= dict.fromkeys((aten.mean.dim, aten.mean.default), _reduction("ReduceMean"))
TABLE |= dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _reduction("ReduceSum"))
TABLE |= {aten.amin.default: _reduction("ReduceMin"), aten.min.default: _reduction("ReduceMin")}
TABLE |= {aten.amax.default: _reduction("ReduceMax"), aten.max.default: _reduction("ReduceMax")}


TABLE |= dict.fromkeys((aten.prod.dim_int, aten.prod.default), _reduction("ReduceProd"))


@entry(aten.any.dim, aten.any.dims, aten.any.default)
def _any(g: OnnxGraph, out: Out, x: Value, axes: Any = None, keepdim: bool = False) -> Value:
    """Largest of zeros and ones: ONNX reduces no booleans."""
    ones = g.cast(g.cast(x, np.bool_), np.float32)
    return g.cast(_reduction("ReduceMax")(g, Out((out.shape, np.float32, out.read)), ones, axes, keepdim), np.bool_)


@entry(aten.cumsum.default)
def _cumsum(g: OnnxGraph, out: Out, x: Value, dim: int, **_: Any) -> Value:
    if not x.shape:
        return g.cast(x, out.dtype)
    return g.emit("CumSum", [g.cast(x, out.dtype), g.constant(dim, np.int64)], [x.shape], out.dtype)[0]


@entry(aten.var.correction)
def _var(
    g: OnnxGraph, out: Out, x: Value, axes: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Value:
    """The sum of squared distances from the mean, over their number less the correction."""
    axes = list(range(len(x.shape))) if not axes else list(axes)
    centred = g.binary("Sub", x, g.reduce("ReduceMean", x, axes, True))
    total = g.reduce("ReduceSum", g.binary("Mul", centred, centred), axes, keepdim)
    count = elements([x.shape[axis] for axis in axes])
    return g.binary("Mul", total, g.constant(1 / max(count - (1 if correction is None else correction), 0), x.dtype))


@entry(aten.linalg_vector_norm.default)
def _norm(
    g: OnnxGraph, out: Out, x: Value, order: float = 2, axes: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    x, axes = g.cast(x, out.dtype), range(len(x.shape)) if axes is None else axes
    if abs(order) == math.inf:
        return g.reduce("ReduceMax" if order > 0 else "ReduceMin", g.unary("Abs", x), list(axes), keepdim)
    if order in (1, 2):
        return g.reduce(f"ReduceL{order:.0f}", x, list(axes), keepdim)
    if order == 0:
        raise NoFormError("a norm of order 0")
    powers = g.binary("Pow", g.unary("Abs", x), g.constant(order, x.dtype))
    return g.binary("Pow", g.reduce("ReduceSum", powers, list(axes), keepdim), g.constant(1 / order, x.dtype))


def index_of(g: OnnxGraph, op: str, x: Value, dim: int | None, shape: Any, keepdim: bool) -> Value:
    """Where the largest ("ArgMax") or smallest is, of all numbers where `dim` is None; ONNX orders no truths."""
    x = g.cast(x, np.float32) if x.dtype is np.bool_ else x
    if dim is None:
        flat = g.reshape(x, (elements(x.shape),))
        return g.reshape(g.emit(op, [flat], [()], np.int64, axis=0, keepdims=0)[0], shape)
    return g.emit(op, [x], [shape], np.int64, axis=dim, keepdims=int(keepdim))[0]


def _index_of(op: str) -> Entry:
    def find(g: OnnxGraph, out: Out, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        return index_of(g, op, x, dim, out.shape, keepdim)

    return find


TABLE |= {aten.argmax.default: _index_of("ArgMax"), aten.argmin.default: _index_of("ArgMin")}


@entry(aten._softmax.default)
def _softmax(g: OnnxGraph, out: Out, x: Value, dim: int, _: bool) -> Value:
    return g.unary("Softmax", x, axis=dim)


@entry(aten._softmax_backward_data.default)
def _softmax_backward(g: OnnxGraph, out: Out, grad: Value, y: Value, dim: int, _: Any) -> Value:
    """y (grad - the sum of grad y)."""
    total = _sum_of_attention(g, grad, y) if dim % len(y.shape) == len(y.shape) - 1 else None
    if total is None:
        total = g.reduce("ReduceSum", g.binary("Mul", grad, y), [dim], True)
    return g.binary("Mul", y, g.binary("Sub", grad, total))


def _sum_of_attention(g: OnnxGraph, grad: Value, y: Value) -> Value | None:
    """The sum of grad y over the keys in attention, where o = y v and grad = do v': that of do o, over the channels.

    There are fewer channels than keys (arXiv 2205.14135, appendix B.2).
    """
    do, transposed, _ = g.products.get((g.source(grad, "Reshape") or grad).name, (None, None, None))
    if do is None or transposed is None:
        return None
    values = g.transpose(transposed, [0, 2, 1])
    for a, b, o in g.products.values():
        if b == values and y in (a, g.source(a, "Reshape")):
            total = g.reduce("ReduceSum", g.binary("Mul", do, o), [2], True)
            return g.reshape(total, (*y.shape[:-1], 1))
    return None


@entry(aten._log_softmax.default)
def _log_softmax(g: OnnxGraph, out: Out, x: Value, dim: int, _: bool) -> Value:
    return g.unary("LogSoftmax", x, axis=dim)


@entry(aten._log_softmax_backward_data.default)
def _log_softmax_backward(g: OnnxGraph, out: Out, grad: Value, y: Value, dim: int, _: Any) -> Value:
    total = g.reduce("ReduceSum", grad, [dim], True)
    return g.binary("Sub", grad, g.binary("Mul", g.unary("Exp", y), total))
