"""Normalisations, of groups with the input gradient, in ONNX operations, with statistics in float32.

    y = x' w + b,   x' = (x - m) r,   m and r = 1 / sqrt(v + eps) of the group (Wu and He, arXiv 1803.08494)
    dx = r (g - mean(g) - x' mean(g x')),   g = dy w,   means over the group

What the networks put behind it, a scale and a shift a sample and channel, goes into w and b (see `OnnxGraph.affine`).
ONNX Runtime has a fast layer normalisation and runs it on rows of a group each. TensorRT cannot build images that are
reshaped to rows and back, so for it every sum is first taken per channel, in four dimensions.
"""

import numpy as np

from dgfast.runtimes.onnx_graph import Dim, OnnxGraph, Shape, Value, elements


def group_norm(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    """y, and mean and r of the groups [B, groups, 1]."""
    dtype = x.dtype
    normal, mean, rstd = (_by_channels if g.rank_4 else _by_rows)(g, g.cast(x, np.float32), groups, eps)
    g.normalised[rstd.name] = normal
    scale, shift = (None if p is None else _per_channel(g, p, len(x.shape)) for p in (weight, bias))
    y = normal if scale is None else g.affine(normal, scale, shift)
    return g.cast(y, dtype), mean, rstd


def layer_norm(
    g: OnnxGraph, x: Value, rank: int, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    """y over the last `rank` sizes, mean and 1 / sqrt(v + eps): an operation of its own, in either library."""
    sizes = elements(x.shape[-rank:])
    statistic: Shape = (*x.shape[:-rank], *[1] * rank)
    scale = g.constant(np.ones(sizes).reshape([elements([d]) for d in x.shape[-rank:]]), np.float32)
    parts = [g.cast(x, np.float32), scale if weight is None else g.cast(weight, np.float32)]
    parts += [] if bias is None else [g.cast(bias, np.float32)]
    y, mean, rstd = g.emit(
        "LayerNormalization", parts, [x.shape, statistic, statistic], np.float32, axis=-rank, epsilon=float(eps)
    )
    return g.cast(y, x.dtype), mean, rstd


def _by_rows(g: OnnxGraph, x: Value, groups: int, eps: float) -> tuple[Value, Value, Value]:
    """x', mean and r, by layer normalisation of one row a group."""
    size = elements(x.shape[1:]) // groups
    rows, statistic = (x.shape[0], groups, size), (x.shape[0], groups, 1)
    normal, mean, rstd = g.emit(
        "LayerNormalization", [g.reshape(x, rows), g.constant(np.ones(size), np.float32)],
        [rows, statistic, statistic], np.float32, axis=-1, epsilon=float(eps),
    )  # fmt: skip
    return g.reshape(normal, x.shape), mean, rstd


def _by_channels(g: OnnxGraph, x: Value, groups: int, eps: float) -> tuple[Value, Value, Value]:
    """x', mean and r, by means of each channel."""
    axes, channels = list(range(2, len(x.shape))), elements(x.shape[1:2])
    grouped: Shape = (x.shape[0], groups, channels // groups)

    def group_mean(image: Value) -> Value:
        return g.reduce("ReduceMean", g.reshape(g.reduce("ReduceMean", image, axes, True), grouped), [2], True)

    def spread(statistic: Value) -> Value:
        ones = g.constant(np.ones((1, 1, channels // groups)), np.float32)
        return g.reshape(g.binary("Mul", statistic, ones), (x.shape[0], channels, *(1 for _ in axes)))

    mean = group_mean(x)
    centred = g.binary("Sub", x, spread(mean))
    variance = group_mean(g.binary("Mul", centred, centred))
    deviation = g.unary("Sqrt", g.binary("Add", variance, g.constant(eps, np.float32)))
    rstd = g.unary("Reciprocal", deviation)
    return g.affine(centred, spread(rstd)), mean, rstd


def group_norm_backward(g: OnnxGraph, grad: Value, x: Value, rstd: Value, weight: Value | None, groups: int) -> Value:
    """dx."""
    normal, rank, channels = g.normalised[rstd.name], len(x.shape), elements(x.shape[1:2])
    axes, batch = list(range(2, rank)), x.shape[0]
    grouped: tuple[Dim, ...] = (batch, groups, channels // groups)
    wide: Shape = (batch, channels, *(1 for _ in axes))
    # grad = scale h: what is constant over the pixels stays outside of the sums over them.
    h, scale, shift = g.affine_parts(grad) or (grad, None, None)
    if shift is not None:
        h, scale = grad, None
    h = g.cast(h, np.float32)
    slope = g.constant(np.ones((1, groups, channels // groups)), np.float32)
    for factor in (scale, weight):
        if factor is not None:
            sizes = (factor.shape[0] if len(factor.shape) > 1 else 1, *grouped[1:])
            slope = g.binary("Mul", slope, g.reshape(g.cast(factor, np.float32), sizes))

    def mean(total: Value) -> Value:
        """-r times the group's mean of slope times that of which `total` has each channel's sum, [B, groups, 1]."""
        summed = g.reduce("ReduceSum", g.binary("Mul", g.reshape(total, grouped), slope), [2], True)
        share = g.constant(-groups / elements(x.shape[1:]), np.float32)
        return g.binary("Mul", g.binary("Mul", summed, share), rstd)

    of_h = mean(g.reduce("ReduceSum", h, axes, True))
    of_product = mean(g.reduce("ReduceSum", g.binary("Mul", h, normal), axes, True))
    own = g.binary("Mul", h, g.reshape(g.binary("Mul", slope, rstd), wide))
    if g.rank_4:
        ones = g.constant(np.ones((1, 1, channels // groups)), np.float32)
        of_h, of_product = (g.reshape(g.binary("Mul", m, ones), wide) for m in (of_h, of_product))
        rest = g.binary("Add", g.binary("Mul", normal, of_product), of_h)
    else:
        rows = g.reshape(normal, (batch, groups, elements(x.shape[1:]) // groups))
        rest = g.reshape(g.binary("Add", g.binary("Mul", rows, of_product), of_h), x.shape)
    return g.cast(g.binary("Add", own, rest), x.dtype)


def _per_channel(g: OnnxGraph, parameter: Value, rank: int) -> Value:
    return g.cast(g.reshape(parameter, (1, *parameter.shape, *([1] * (rank - 2)))), np.float32)
