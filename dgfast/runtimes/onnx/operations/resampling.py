"""Pooling and resizing of images, and their gradients, in ONNX."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph, Value
from dgfast.runtimes.onnx.operations.table import NoFormError, Out, entry

aten = torch.ops.aten


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
