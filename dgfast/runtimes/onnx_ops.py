"""What each ATen operation of a lowered graph is in ONNX: one table.

Gradients of activations, softmax, pooling and slices are written as the inference operations that they are. Results
that only a backward operation would read (a normalisation's statistics) are kept in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes import onnx_norm
from dgfast.runtimes.onnx_graph import Batch, OnnxGraph, Value, broadcast, elements

aten = torch.ops.aten

Entry = Callable[..., Any]
"""(graph, out, *arguments, **keywords) -> Value or tuple; `out` is the shape and numpy type that torch says."""

TABLE: dict[Any, Entry] = {}


class NoFormError(Exception):
    """An operation, or these options of one, that the table cannot write: users hear of it from `onnx_writer`."""


class Out(tuple[Any, Any]):
    """Shape and type of an operation's (first) result."""

    shape = property(lambda self: self[0])
    dtype = property(lambda self: self[1])


def entry(*targets: Any) -> Callable[[Entry], Entry]:
    def register(function: Entry) -> Entry:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


def number(g: OnnxGraph, x: Any, dtype: Any) -> Value:
    """A tensor or a plain number as a value of this type."""
    return g.cast(x, dtype) if isinstance(x, Value) else g.constant(x, dtype)


# Elementwise ----------------------------------------------------------------------------------------------------------
_UNARY = {
    aten.neg: "Neg", aten.exp: "Exp", aten.log: "Log", aten.sqrt: "Sqrt", aten.reciprocal: "Reciprocal",
    aten.cos: "Cos", aten.sin: "Sin", aten.sigmoid: "Sigmoid", aten.tanh: "Tanh", aten.relu: "Relu", aten.abs: "Abs",
    aten.atan: "Atan", aten.erf: "Erf", aten.floor: "Floor", aten.sign: "Sign", aten.logical_not: "Not",
}  # fmt: skip
_COMPARISONS = {
    aten.ge: "GreaterOrEqual", aten.le: "LessOrEqual", aten.gt: "Greater", aten.lt: "Less", aten.eq: "Equal",
}  # fmt: skip
_ARITHMETIC = {
    aten.add.Tensor: "Add", aten.add.Scalar: "Add", aten.sub.Tensor: "Sub", aten.sub.Scalar: "Sub",
    aten.mul.Tensor: "Mul", aten.mul.Scalar: "Mul", aten.div.Tensor: "Div", aten.div.Scalar: "Div",
    aten.maximum.default: "Max", aten.minimum.default: "Min", aten.pow.Tensor_Tensor: "Pow", aten.pow.Scalar: "Pow",
}  # fmt: skip
_LOGIC = {
    aten.logical_and.default: "And", aten.bitwise_and.Tensor: "And", aten.logical_or.default: "Or",
    aten.bitwise_or.Tensor: "Or",
}  # fmt: skip


def _unary(op: str) -> Entry:
    return lambda g, out, x: g.unary(op, g.cast(x, out.dtype))


def _compared(op: str) -> Entry:
    def compare(g: OnnxGraph, out: Out, a: Value, b: Any) -> Value:
        dtype = np.result_type(a.dtype, b.dtype).type if isinstance(b, Value) else _holding(a.dtype, b)
        dtype = np.float32 if dtype is np.float64 else dtype
        return g.binary(op, number(g, a, dtype), number(g, b, dtype), np.bool_)

    return compare


def _holding(dtype: Any, number: Any) -> Any:
    """A type in which a tensor of `dtype` and this number can be compared."""
    return np.float32 if isinstance(number, float) and not np.issubdtype(dtype, np.floating) else dtype


def _arithmetic(op: str) -> Entry:
    def compute(g: OnnxGraph, out: Out, a: Any, b: Any, *, alpha: Any = 1) -> Value:
        left, right = number(g, a, out.dtype), number(g, b, out.dtype)
        if alpha != 1:
            right = g.mul(right, g.constant(alpha, out.dtype))
        if op in ("Add", "Mul"):
            return getattr(g, op.lower())(left, right)
        if op == "Div" and not isinstance(b, Value):
            return g.mul(left, g.constant(1 / b, out.dtype))
        return g.binary(op, left, right)

    return compute


TABLE |= {packet.default: _unary(op) for packet, op in _UNARY.items()}
TABLE |= {getattr(packet, kind): _compared(op) for packet, op in _COMPARISONS.items() for kind in ("Scalar", "Tensor")}
TABLE |= {target: _arithmetic(op) for target, op in _ARITHMETIC.items()}
TABLE |= {
    target: lambda g, out, a, b, op=op: g.binary(op, number(g, a, np.bool_), number(g, b, np.bool_), np.bool_)
    for target, op in _LOGIC.items()
}


@entry(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(g: OnnxGraph, out: Out, a: Value, b: Any) -> Value:
    return g.binary("Sub", number(g, b, out.dtype), g.cast(a, out.dtype))


@entry(aten.rsqrt.default)
def _rsqrt(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.unary("Reciprocal", g.unary("Sqrt", x))


@entry(aten.log1p.default)
def _log1p(g: OnnxGraph, out: Out, x: Value) -> Value:
    """log(u) x / (u - 1) with u = 1 + x as rounded: exact where log(1 + x) is not (Goldberg 1991, theorem 4)."""
    one = g.constant(1, x.dtype)
    u = g.binary("Add", x, one)
    rest = g.binary("Sub", u, one)
    tiny = g.binary("Equal", rest, g.constant(0, x.dtype), np.bool_)
    ratio = g.binary("Div", x, where(g, tiny, one, rest))
    return where(g, tiny, x, g.binary("Mul", g.unary("Log", u), ratio))


@entry(aten.expm1.default)
def _expm1(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.binary("Sub", g.unary("Exp", x), g.constant(1, x.dtype))


@entry(aten.silu.default)
def silu(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.binary("Mul", x, g.unary("Sigmoid", x))


@entry(aten.silu_backward.default)
def _silu_backward(g: OnnxGraph, out: Out, grad: Value, x: Value) -> Value:
    """grad (s + y - y s), of s = sigmoid(x) and y = silu(x), which the forward pass has."""
    s, y = g.unary("Sigmoid", x), silu(g, out, x)
    slope = g.binary("Add", s, g.binary("Sub", y, g.binary("Mul", y, s)))
    return g.binary("Mul", grad, slope)


@entry(aten.gelu.default)
def _gelu(g: OnnxGraph, out: Out, x: Value, *, approximate: str = "none") -> Value:
    """x / 2 (1 + erf(x / sqrt 2)), or with a hyperbolic tangent for it (arXiv 1606.08415): opset 20 alone has both."""
    if approximate == "none":
        bent = g.unary("Erf", g.binary("Mul", x, g.constant(math.sqrt(0.5), x.dtype)))
    else:
        cubed = g.binary("Mul", g.binary("Mul", g.binary("Mul", x, x), x), g.constant(0.044715, x.dtype))
        inner = g.binary("Add", x, cubed)
        bent = g.unary("Tanh", g.binary("Mul", inner, g.constant(math.sqrt(2 / math.pi), x.dtype)))
    half = g.binary("Mul", x, g.constant(0.5, x.dtype))
    return g.binary("Mul", half, g.binary("Add", bent, g.constant(1, x.dtype)))


@entry(aten.pow.Tensor_Scalar)
def _pow(g: OnnxGraph, out: Out, x: Value, exponent: float) -> Value:
    x = g.cast(x, out.dtype)
    return g.binary("Mul", x, x) if exponent == 2 else g.binary("Pow", x, g.constant(exponent, out.dtype))


def where(g: OnnxGraph, condition: Value, a: Value, b: Value) -> Value:
    shape = broadcast(condition.shape, broadcast(a.shape, b.shape))
    return g.emit("Where", [condition, a, b], [shape], a.dtype)[0]


@entry(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(g: OnnxGraph, out: Out, condition: Value, a: Any, b: Any) -> Value:
    return g.emit("Where", [condition, number(g, a, out.dtype), number(g, b, out.dtype)], [out.shape], out.dtype)[0]


@entry(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(g: OnnxGraph, out: Out, x: Value, low: Any = None, high: Any = None) -> Value:
    bounds = [None if b is None else g.constant(b, out.dtype) for b in (low, high)]
    return g.emit("Clip", [x, *bounds], [x.shape], out.dtype)[0]


@entry(aten._to_copy.default, aten.clone.default, aten.to.dtype)
def _copy(g: OnnxGraph, out: Out, x: Value, *_: Any, **__: Any) -> Value:
    return g.cast(x, out.dtype)


@entry(aten.full.default, aten.scalar_tensor.default, aten.full_like.default, aten.new_full.default)
def _full(g: OnnxGraph, out: Out, *arguments: Any, **_: Any) -> Value:
    return g.expand(g.constant(arguments[-1], out.dtype), out.shape)


TABLE |= {
    target: lambda g, out, *_, value=value, **__: g.expand(g.constant(value, out.dtype), out.shape)
    for value, targets in enumerate(
        [
            (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
            (aten.ones.default, aten.ones_like.default, aten.new_ones.default),
        ]
    )
    for target in targets
}


# Sums -----------------------------------------------------------------------------------------------------------------
def _reduction(op: str) -> Entry:
    def reduce(g: OnnxGraph, out: Out, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> Value:
        axes = [axes] if isinstance(axes, int) else axes or range(len(x.shape))
        return g.reduce(op, g.cast(x, out.dtype), list(axes), keepdim)

    return reduce


TABLE |= dict.fromkeys((aten.mean.dim, aten.mean.default), _reduction("ReduceMean"))
TABLE |= dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _reduction("ReduceSum"))
TABLE |= {aten.amin.default: _reduction("ReduceMin"), aten.min.default: _reduction("ReduceMin")}
TABLE |= {aten.amax.default: _reduction("ReduceMax"), aten.max.default: _reduction("ReduceMax")}


@entry(aten.any.dim)
def _any(g: OnnxGraph, out: Out, x: Value, dim: int, keepdim: bool = False) -> Value:
    """Largest of zeros and ones: ONNX reduces no booleans."""
    return g.cast(g.reduce("ReduceMax", g.cast(g.cast(x, np.bool_), np.float32), [dim], keepdim), np.bool_)


@entry(aten.linalg_vector_norm.default)
def _norm(g: OnnxGraph, out: Out, x: Value, order: float, axes: Any = None, keepdim: bool = False, **_: Any) -> Value:
    x, axes = g.cast(x, out.dtype), range(len(x.shape)) if axes is None else axes
    if order == math.inf:
        return g.reduce("ReduceMax", g.unary("Abs", x), list(axes), keepdim)
    if order != 2:
        raise NoFormError(f"a norm of order {order}")
    return g.reduce("ReduceL2", x, list(axes), keepdim)


def _index_of(op: str) -> Entry:
    def find(g: OnnxGraph, out: Out, x: Value, dim: int, keepdim: bool = False) -> Value:
        return g.emit(op, [x], [out.shape], np.int64, axis=dim, keepdims=int(keepdim))[0]

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


# Linear maps ----------------------------------------------------------------------------------------------------------
@entry(aten.convolution.default)
def _convolution(
    g: OnnxGraph, out: Out, x: Value, weight: Value, bias: Value | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
) -> Value:  # fmt: skip
    attributes: dict[str, Any] = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    if transposed:
        attributes["output_padding"] = output_padding
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.emit("ConvTranspose" if transposed else "Conv", inputs, [out.shape], out.dtype, **attributes)[0]


@entry(aten.addmm.default)
def _addmm(g: OnnxGraph, out: Out, bias: Value, a: Value, b: Value, *, alpha: float = 1, beta: float = 1) -> Value:
    return g.emit("Gemm", [a, b, bias], [out.shape], out.dtype, alpha=float(alpha), beta=float(beta))[0]


@entry(aten.mm.default, aten.matmul.default)
def _mm(g: OnnxGraph, out: Out, a: Value, b: Value) -> Value:
    return g.emit("MatMul", [a, b], [out.shape], out.dtype)[0]


@entry(aten.bmm.default)
def _bmm(g: OnnxGraph, out: Out, a: Value, b: Value) -> Value:
    product = _batched_product(g, out, a, b)
    g.products[product.name] = a, b, product
    return product


def _batched_product(g: OnnxGraph, out: Out, a: Value, b: Value) -> Value:
    """In as many dimensions as both had before they were flattened to three; a weight once, not once a sample."""
    weight = g.array(g.source(b, "Expand") or b)
    if weight is not None and bool((weight == weight[:1]).all()):
        return g.emit("MatMul", [a, g.constant(weight[0])], [out.shape], out.dtype)[0]
    left, right = (g.source(x, "Reshape") for x in (a, b))
    if left is not None and right is not None and len(left.shape) == 4 and left.shape[:2] == right.shape[:2]:
        same = left.shape[2:] == a.shape[1:] and right.shape[2:] == b.shape[1:]
        if same:
            shape = (*left.shape[:3], right.shape[3])
            return g.reshape(g.emit("MatMul", [left, right], [shape], out.dtype)[0], out.shape)
    return g.emit("MatMul", [a, b], [out.shape], out.dtype)[0]


@entry(aten.embedding.default)
def _embedding(g: OnnxGraph, out: Out, table: Value, indices: Value, *_: Any) -> Value:
    return g.emit("Gather", [table, indices], [out.shape], out.dtype, axis=0)[0]


@entry(aten.index.Tensor)
def _index(g: OnnxGraph, out: Out, x: Value, indices: Sequence[Value | None]) -> Value:
    if len(indices) != 1 or indices[0] is None:
        raise NoFormError("indexing by tensors in more than the first dimension")
    return g.emit("Gather", [x, indices[0]], [out.shape], out.dtype, axis=0)[0]


@entry(aten.native_group_norm.default)
def _group_norm(
    g: OnnxGraph, out: Out, x: Value, weight: Value | None, bias: Value | None, n: Any, c: int, hw: int, groups: int,
    eps: float,
) -> tuple[Value, Value, Value]:  # fmt: skip
    return onnx_norm.group_norm(g, x, weight, bias, groups, eps)


@entry(aten.native_group_norm_backward.default)
def _group_norm_backward(
    g: OnnxGraph, out: Out, grad: Value, x: Value, mean: Value, rstd: Value, weight: Value | None, n: Any, c: int,
    hw: int, groups: int, mask: list[bool],
) -> tuple[Value, None, None]:  # fmt: skip
    if mask != [True, False, False]:
        raise NoFormError("a gradient with respect to weights: freeze the networks")
    return onnx_norm.group_norm_backward(g, grad, x, rstd, weight, groups), None, None


@entry(aten.native_layer_norm.default)
def _layer_norm(
    g: OnnxGraph, out: Out, x: Value, shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    return onnx_norm.layer_norm(g, x, len(shape), weight, bias, eps)


# Resampling -----------------------------------------------------------------------------------------------------------
def _halving(kernel: list[int], stride: list[int], padding: list[int]) -> None:
    if list(stride or kernel) != list(kernel) or any(padding):
        raise NoFormError(f"mean pooling with kernel {kernel}, stride {stride}, padding {padding}")


@entry(aten.avg_pool2d.default)
def _avg_pool(
    g: OnnxGraph, out: Out, x: Value, kernel: list[int], stride: Any = (), padding: Any = (0,), *_: Any
) -> Value:
    _halving(kernel, stride, padding)
    return g.emit("AveragePool", [x], [out.shape], out.dtype, kernel_shape=kernel, strides=kernel)[0]


@entry(aten.avg_pool2d_backward.default)
def _avg_pool_backward(
    g: OnnxGraph, out: Out, grad: Value, x: Value, kernel: list[int], stride: Any, padding: Any, *_: Any
) -> Value:
    _halving(kernel, stride, padding)
    return _repeat(g, g.mul(grad, g.constant(1 / math.prod(kernel), out.dtype)), x.shape, kernel)


@entry(aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec)
def _upsample(g: OnnxGraph, out: Out, x: Value, *_: Any) -> Value:
    factors = [a // b for a, b in zip(out.shape[2:], x.shape[2:], strict=True)]
    if [f * d for f, d in zip(factors, x.shape[2:], strict=True)] != list(out.shape[2:]):
        raise NoFormError("nearest-neighbour resampling by other than whole factors")
    return _repeat(g, x, out.shape, factors)


def _repeat(g: OnnxGraph, x: Value, shape: Any, factors: Sequence[int]) -> Value:
    """Every pixel as a block of factors[0] x factors[1] pixels."""
    scales = g.constant([1.0, 1.0, *map(float, factors)], np.float32)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.emit("Resize", [x, None, scales], [shape], x.dtype, **how)[0]


# Layout ---------------------------------------------------------------------------------------------------------------
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
