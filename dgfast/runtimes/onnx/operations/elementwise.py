"""Operations of each number by itself, activations and their gradients among them, in ONNX."""

import math
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx import fused
from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.table import TABLE, Entry, Out, entry, number
from dgfast.runtimes.onnx.values import Value, broadcast

aten = torch.ops.aten


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
    aten.bitwise_or.Tensor: "Or", aten.bitwise_and.Scalar: "And", aten.bitwise_or.Scalar: "Or",
}  # fmt: skip


def _unary(op: str) -> Entry:
    return lambda g, out, x: g.unary(op, g.cast(x, out.dtype))


def _compared(op: str) -> Entry:
    def compare(g: OnnxGraph, out: Out, a: Value, b: Any) -> Value:
        dtype = np.result_type(a.dtype, b.dtype).type if isinstance(b, Value) else _holding(a.dtype, b)
        dtype = g.wide if dtype is np.float64 else dtype
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
        if out.dtype is np.bool_:
            return g.binary({"Add": "Or", "Mul": "And"}[op], left, right)
        if op in ("Add", "Mul"):
            return getattr(g, op.lower())(left, right)
        if op == "Div" and not isinstance(b, Value):
            return g.mul(left, g.constant(1 / b, out.dtype))
        return g.binary(op, left, right)

    return compute


def _logical(op: str) -> Entry:
    """Of truths; of whole numbers, bit by bit."""

    def compute(g: OnnxGraph, out: Out, a: Any, b: Any) -> Value:
        if out.dtype is np.bool_:
            return g.binary(op, number(g, a, np.bool_), number(g, b, np.bool_), np.bool_)
        return g.emit(f"Bitwise{op}", [number(g, a, out.dtype), number(g, b, out.dtype)], [out.shape], out.dtype)[0]

    return compute


TABLE |= {packet.default: _unary(op) for packet, op in _UNARY.items()}
TABLE |= {getattr(packet, kind): _compared(op) for packet, op in _COMPARISONS.items() for kind in ("Scalar", "Tensor")}
TABLE |= {target: _arithmetic(op) for target, op in _ARITHMETIC.items()}
TABLE |= {target: _logical(op) for target, op in _LOGIC.items()}


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
    return fused.with_silu(g, x) or g.binary("Mul", x, g.unary("Sigmoid", x))


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
            (
                aten.zeros.default,
                aten.zeros_like.default,
                aten.new_zeros.default,
                aten.empty.memory_format,
                aten.empty_like.default,
                aten.new_empty.default,  # of any value
                aten.new_empty_strided.default,
                aten.empty_strided.default,
            ),
            (aten.ones.default, aten.ones_like.default, aten.new_ones.default),
        ]
    )
    for target in targets
}
