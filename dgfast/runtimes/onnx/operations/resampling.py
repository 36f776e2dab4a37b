"""Pooling and resizing of images, and their gradients, in ONNX."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations.table import NoFormError, Out, entry
from dgfast.runtimes.onnx.values import Batch, Dim, Value, elements

aten = torch.ops.aten


def _is_by_blocks(kernel: list[int], stride: Any, padding: Any) -> bool:
    """Whether each result is the mean of a block of its own."""
    return list(stride or kernel) == list(kernel) and not any(padding)


@entry(aten.avg_pool2d.default)
def _avg_pool(
    g: OnnxGraph, out: Out, x: Value, kernel: list[int], stride: Any = (), padding: Any = (0, 0), ceil: bool = False,
    with_padding: bool = True, divisor: int | None = None,
) -> Value:  # fmt: skip
    if _is_by_blocks(kernel, stride, padding) and not ceil and divisor is None:
        return g.emit("AveragePool", [x], [out.shape], out.dtype, kernel_shape=kernel, strides=kernel)[0]
    options = {"kernel_shape": kernel, "strides": list(stride or kernel), "pads": list(padding) * 2}
    if divisor is not None or ceil:
        raise NoFormError("mean pooling with a divisor of its own, or whose last window reaches over the edge")
    return g.emit("AveragePool", [x], [out.shape], out.dtype, count_include_pad=int(with_padding), **options)[0]


@entry(aten.avg_pool2d_backward.default)
def _avg_pool_backward(
    g: OnnxGraph, out: Out, grad: Value, x: Value, kernel: list[int], stride: Any, padding: Any, ceil: bool,
    with_padding: bool, divisor: int | None,
) -> Value:  # fmt: skip
    if divisor is not None or ceil or (any(padding) and not with_padding):
        raise NoFormError("the gradient of mean pooling with a divisor that differs from window to window")
    share = 1 / math.prod(kernel)
    fits = _sides(x) == [side * k for side, k in zip(_sides(grad), kernel, strict=True)]
    if _is_by_blocks(kernel, stride, padding) and fits:
        return _repeat(g, g.mul(grad, g.constant(share, out.dtype)), x.shape, kernel)
    return _spread(g, g.mul(grad, g.constant(share, out.dtype)), x, kernel, list(stride or kernel), list(padding))


def _sides(image: Value) -> list[int]:
    return [elements([side]) for side in image.shape[2:]]


def _times(size: Dim, count: int) -> Dim:
    return Batch(size.times * count) if isinstance(size, Batch) else size * count


def _spread(g: OnnxGraph, grad: Value, x: Value, kernel: list[int], stride: list[int], padding: list[int]) -> Value:
    """Each number added to all of the window that it came from: a transposed convolution of each plane with ones."""
    planes = _times(x.shape[0], elements([x.shape[1]]))
    sides = zip(_sides(x), _sides(grad), stride, padding, kernel, strict=True)
    rest = [side - ((small - 1) * s - 2 * p + k) for side, small, s, p, k in sides]
    image, ones = g.reshape(grad, (planes, 1, *grad.shape[2:])), g.constant(np.ones((1, 1, *kernel)), grad.dtype)
    options = {"strides": stride, "pads": padding * 2, "output_padding": rest}
    return g.reshape(
        g.emit("ConvTranspose", [image, ones], [(planes, 1, *x.shape[2:])], x.dtype, **options)[0], x.shape
    )


@entry(aten.max_pool2d_with_indices.default)
def _max_pool(
    g: OnnxGraph, out: Out, x: Value, kernel: list[int], stride: Any = (), padding: Any = (0, 0),
    dilation: Any = (1, 1), ceil: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    """The largest of each window, and where in its plane it is; ONNX counts through all planes."""
    y, place = g.emit(
        "MaxPool", [x], [out.shape, out.shape], [out.dtype, np.int64], kernel_shape=kernel, ceil_mode=int(ceil),
        strides=list(stride or kernel), pads=list(padding) * 2, dilations=list(dilation),
    )  # fmt: skip
    pixels = g.constant(elements(x.shape[-2:]), np.int64)
    return y, g.emit("Mod", [place, pixels], [place.shape], np.int64)[0]


@entry(aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec)
def _upsample(g: OnnxGraph, out: Out, x: Value, *_: Any) -> Value:
    factors = [a // b for a, b in zip(out.shape[2:], x.shape[2:], strict=True)]
    if [f * d for f, d in zip(factors, x.shape[2:], strict=True)] != list(out.shape[2:]):
        raise NoFormError("nearest-neighbour resampling by other than whole factors")
    return _repeat(g, x, out.shape, factors)


@entry(aten.upsample_nearest2d_backward.default)
def _upsample_backward(g: OnnxGraph, out: Out, grad: Value, *_: Any) -> Value:
    """The sum of each block."""
    factors = [a // b for a, b in zip(grad.shape[2:], out.shape[2:], strict=True)]
    if [f * d for f, d in zip(factors, out.shape[2:], strict=True)] != list(grad.shape[2:]):
        raise NoFormError("the gradient of nearest-neighbour resampling by other than whole factors")
    (mean,) = g.emit("AveragePool", [grad], [out.shape], out.dtype, kernel_shape=factors, strides=factors)
    return g.mul(mean, g.constant(math.prod(factors), out.dtype))


def _repeat(g: OnnxGraph, x: Value, shape: Any, factors: Sequence[int]) -> Value:
    """Every pixel as a block of factors[0] x factors[1] pixels."""
    scales = g.constant([1.0, 1.0, *map(float, factors)], np.float32)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.emit("Resize", [x, None, scales], [shape], x.dtype, **how)[0]
