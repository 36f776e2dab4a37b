"""Further functions of each number by itself: trigonometry, roundings, remainders, tests, in ONNX."""

import math
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.elementwise import where
from dgfast.runtimes.onnx.operations.table import TABLE, Entry, NoFormError, Out, entry, number
from dgfast.runtimes.onnx.values import Value, broadcast

aten = torch.ops.aten

_UNARY = {
    aten.tan: "Tan", aten.asin: "Asin", aten.acos: "Acos", aten.sinh: "Sinh", aten.cosh: "Cosh", aten.asinh: "Asinh",
    aten.acosh: "Acosh", aten.atanh: "Atanh", aten.ceil: "Ceil", aten.round: "Round", aten.sgn: "Sign",
}  # fmt: skip
_TESTS = {aten.isnan: "IsNaN", aten.isinf: "IsInf"}


def _unary(op: str) -> Entry:
    return lambda g, out, x: g.unary(op, g.cast(x, out.dtype))


def _test(op: str) -> Entry:
    return lambda g, out, x: g.unary(op, x if _is_float(x.dtype) else g.cast(x, np.float32), np.bool_)


TABLE |= {packet.default: _unary(op) for packet, op in _UNARY.items()}
TABLE |= {packet.default: _test(op) for packet, op in _TESTS.items()}


@entry(aten.trunc.default)
def _trunc(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.binary("Mul", g.unary("Sign", x), g.unary("Floor", g.unary("Abs", x)))


@entry(aten.exp2.default)
def _exp2(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.binary("Pow", g.constant(2, out.dtype), g.cast(x, out.dtype))


def _logarithm(base: float) -> Entry:
    def logarithm(g: OnnxGraph, out: Out, x: Value) -> Value:
        return g.binary("Mul", g.unary("Log", g.cast(x, out.dtype)), g.constant(1 / math.log(base), out.dtype))

    return logarithm


TABLE |= {aten.log2.default: _logarithm(2), aten.log10.default: _logarithm(10)}


@entry(aten.erfc.default)
def _erfc(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.binary("Sub", g.constant(1, out.dtype), g.unary("Erf", x))


@entry(aten.hypot.default)
def _hypot(g: OnnxGraph, out: Out, x: Value, y: Value) -> Value:
    return g.unary("Sqrt", g.binary("Add", g.binary("Mul", x, x), g.binary("Mul", y, y)))


@entry(aten.atan2.default)
def _atan2(g: OnnxGraph, out: Out, y: Value, x: Value) -> Value:
    """The angle of (x, y) in (-pi, pi]: the arctan of y / x, and half a turn more where x is negative."""
    zero, x, y = g.constant(0, out.dtype), g.cast(x, out.dtype), g.cast(y, out.dtype)
    upright = g.binary("Equal", x, zero, np.bool_)
    angle = g.unary("Atan", g.binary("Div", y, where(g, upright, g.constant(1, out.dtype), x)))
    turn = _choose(g, g.binary("Less", y, zero, np.bool_), -math.pi, math.pi, out.dtype)
    turned = where(g, g.binary("Less", x, zero, np.bool_), g.binary("Add", angle, turn), angle)
    quarter = g.binary("Mul", g.unary("Sign", y), g.constant(math.pi / 2, out.dtype))
    return where(g, upright, quarter, turned)


def _choose(g: OnnxGraph, condition: Value, yes: float, no: float, dtype: Any) -> Value:
    return where(g, condition, g.constant(yes, dtype), g.constant(no, dtype))


# Remainders: of integers ONNX's have the divisor's sign, of others the dividend's -------------------------------------
@entry(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(g: OnnxGraph, out: Out, a: Any, b: Any) -> Value:
    left, right = number(g, a, out.dtype), number(g, b, out.dtype)
    return g.emit("Mod", [left, right], [broadcast(left.shape, right.shape)], out.dtype, fmod=1)[0]


@entry(aten.remainder.Scalar, aten.remainder.Tensor, aten.remainder.Scalar_Tensor)
def _remainder(g: OnnxGraph, out: Out, a: Any, b: Any) -> Value:
    """With the divisor's sign, as Python's."""
    left, right = number(g, a, out.dtype), number(g, b, out.dtype)
    if not _is_float(out.dtype):
        return g.emit("Mod", [left, right], [broadcast(left.shape, right.shape)], out.dtype)[0]
    rest, zero = _fmod(g, out, left, right), g.constant(0, out.dtype)
    differ = g.binary("Less", g.binary("Mul", g.unary("Sign", rest), g.unary("Sign", right)), zero, np.bool_)
    return where(g, differ, g.binary("Add", rest, right), rest)


@entry(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def _divide(g: OnnxGraph, out: Out, a: Any, b: Any, *, rounding_mode: str | None = "floor") -> Value:
    left, right = number(g, a, out.dtype), number(g, b, out.dtype)
    if rounding_mode is None:
        return g.binary("Div", left, right)
    rest = (_remainder if rounding_mode == "floor" else _fmod)(g, out, left, right)
    whole = g.binary("Div", g.binary("Sub", left, rest), right)
    return g.unary("Round", whole) if _is_float(out.dtype) else whole


# Truths and bits ------------------------------------------------------------------------------------------------------
@entry(aten.ne.Scalar, aten.ne.Tensor)
def _ne(g: OnnxGraph, out: Out, a: Value, b: Any) -> Value:
    equal = TABLE[aten.eq.Tensor if isinstance(b, Value) else aten.eq.Scalar]
    return g.unary("Not", equal(g, out, a, b))


@entry(aten.bitwise_not.default)
def _not(g: OnnxGraph, out: Out, x: Value) -> Value:
    return g.unary("Not" if out.dtype is np.bool_ else "BitwiseNot", x)


@entry(aten.logical_xor.default, aten.bitwise_xor.Tensor)
def _xor(g: OnnxGraph, out: Out, a: Value, b: Value) -> Value:
    if out.dtype is not np.bool_:
        raise NoFormError("exclusive or of the bits of whole numbers")
    return g.binary("Xor", g.cast(a, np.bool_), g.cast(b, np.bool_), np.bool_)


@entry(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor)
def _clamp(g: OnnxGraph, out: Out, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    x = g.cast(x, out.dtype)
    x = x if low is None else g.binary("Max", x, g.cast(low, out.dtype))
    return x if high is None else g.binary("Min", x, g.cast(high, out.dtype))


def _is_float(dtype: Any) -> bool:
    return bool(np.issubdtype(dtype, np.floating))
