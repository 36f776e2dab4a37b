"""Convolutions, matrix products, look-ups and normalisations in ONNX."""

from typing import Any

import torch

from dgfast.runtimes.onnx import fused, normalisation
from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.table import NoFormError, Out, entry
from dgfast.runtimes.onnx.values import Value

aten = torch.ops.aten


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


@entry(aten.native_group_norm.default)
def _group_norm(
    g: OnnxGraph, out: Out, x: Value, weight: Value | None, bias: Value | None, n: Any, c: int, hw: int, groups: int,
    eps: float,
) -> tuple[Value, Value | None, Value | None]:  # fmt: skip
    y = fused.group_norm(g, x, weight, bias, groups, eps) if g.fused and out.read == {0} else None
    return normalisation.group_norm(g, x, weight, bias, groups, eps) if y is None else (y, None, None)


@entry(aten.native_group_norm_backward.default)
def _group_norm_backward(
    g: OnnxGraph, out: Out, grad: Value, x: Value, mean: Value, rstd: Value, weight: Value | None, n: Any, c: int,
    hw: int, groups: int, mask: list[bool],
) -> tuple[Value, None, None]:  # fmt: skip
    if mask != [True, False, False]:
        raise NoFormError("a gradient with respect to weights: freeze the networks")
    return normalisation.group_norm_backward(g, grad, x, rstd, weight, groups), None, None


@entry(aten.native_layer_norm.default)
def _layer_norm(
    g: OnnxGraph, out: Out, x: Value, shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    return normalisation.layer_norm(g, x, len(shape), weight, bias, eps)
