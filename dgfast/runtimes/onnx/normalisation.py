"""Normalisations, of groups with the input gradient, in ONNX operations, with statistics in float32 at least.

    y = x' w + b,   x' = (x - m) r,   m and r = 1 / sqrt(v + eps) of the group (Wu and He, arXiv 1803.08494)
    dx = r (g - mean(g) - x' mean(g x')),   g = dy w,   means over the group

What the networks put behind it, a scale and a shift a sample and channel, goes into w and b (see `OnnxGraph.affine`).
ONNX Runtime runs one operation after the other over all of an image, so what counts is how often the image is read and
written. There y is A (x - m) + b with A = r w, one number a channel each, after two means of rows of a group each; its
own layer normalisation sums one number at a time and leaves w and b to be done. TensorRT
cannot build images that are reshaped to rows and back: there every sum is first taken per channel, in four dimensions.
"""

import numpy as np

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.values import Shape, Value, elements

_LEAST_OF_A_MATRIX_PRODUCT = 1024  # numbers of a row from which on a product of row and column beats a sum


def group_norm(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    """y, and mean and r of the groups."""
    write = _by_channels if g.rank_4 else _by_rows
    y, mean, rstd = write(g, g.cast(x, g.wide), weight, bias, groups, eps)
    return g.cast(y, x.dtype), mean, rstd


def layer_norm(
    g: OnnxGraph, x: Value, rank: int, weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    """y over the last `rank` sizes, mean and 1 / sqrt(v + eps): an operation of its own, in either library."""
    sizes = elements(x.shape[-rank:])
    statistic: Shape = (*x.shape[:-rank], *[1] * rank)
    scale = g.constant(np.ones(sizes).reshape([elements([d]) for d in x.shape[-rank:]]), g.wide)
    parts = [g.cast(x, g.wide), scale if weight is None else g.cast(weight, g.wide)]
    parts += [] if bias is None else [g.cast(bias, g.wide)]
    y, mean, rstd = g.emit(
        "LayerNormalization", parts, [x.shape, statistic, statistic], g.wide, axis=-rank, epsilon=float(eps)
    )
    return g.cast(y, x.dtype), mean, rstd


def _by_rows(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    """y, and mean and r [B, groups, 1, 1], by moments of one row a group."""
    rows, grouped = _rows(g, x, groups), (1, groups, elements(x.shape[1:2]) // groups, 1)
    mean = g.reduce("ReduceMean", rows, [3], True)
    # Not from the mean of squares, which takes one pass less: where the mean is 30 deviations, 1e-4 would be lost.
    centred = g.binary("Sub", rows, mean)
    variance = _mean_product(g, centred, centred)
    rstd = g.unary("Reciprocal", g.unary("Sqrt", g.binary("Add", variance, g.constant(eps, g.wide))))
    start = g.constant(np.zeros(grouped), g.wide) if bias is None else g.cast(g.reshape(bias, grouped), g.wide)
    g.normalised[rstd.name] = centred
    shift = g.reshape(start, (1, *_wide(x)[1:]))
    return g.affine(g.reshape(centred, x.shape), _slope(g, x, rstd, weight, grouped), shift), mean, rstd


def _slope(g: OnnxGraph, x: Value, rstd: Value, weight: Value | None, grouped: Shape) -> Value:
    """r w, one number a sample and channel. Two normalisations of one image have r in common, and w not."""
    w = g.constant(np.ones(grouped), g.wide) if weight is None else g.cast(g.reshape(weight, grouped), g.wide)
    return g.reshape(g.binary("Mul", rstd, w), _wide(x))


def _rows(g: OnnxGraph, x: Value, groups: int) -> Value:
    return g.reshape(x, (x.shape[0], groups, 1, elements(x.shape[1:]) // groups))


def _mean_product(g: OnnxGraph, a: Value, b: Value) -> Value:
    """Means of the products of two tensors of rows [B, groups, 1, size] -> [B, groups, 1, 1]."""
    size = elements(a.shape[3:])
    if size < _LEAST_OF_A_MATRIX_PRODUCT:
        return g.reduce("ReduceMean", g.binary("Mul", a, b), [3], True)
    # Not `g.transpose`, which would make a reshape of it: ONNX Runtime takes a transpose into the product. A single
    # factor it would take in too, and then leave its fast product of a row and a column.
    (column,) = g.emit("Transpose", [b], [(*b.shape[:2], size, 1)], g.wide, perm=[0, 1, 3, 2])
    (total,) = g.emit("MatMul", [a, column], [(*a.shape[:2], 1, 1)], g.wide)
    g.statistics.add(total.name)
    return g.binary("Mul", total, g.constant(np.full((1, *a.shape[1:2], 1, 1), 1 / size), g.wide))


def _by_channels(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    """y, and mean and r [B, groups, 1], by means of each channel."""
    axes, channels = list(range(2, len(x.shape))), elements(x.shape[1:2])
    grouped: Shape = (x.shape[0], groups, channels // groups)

    def group_mean(image: Value) -> Value:
        return g.reduce("ReduceMean", g.reshape(g.reduce("ReduceMean", image, axes, True), grouped), [2], True)

    def spread(statistic: Value) -> Value:
        ones = g.constant(np.ones((1, 1, channels // groups)), g.wide)
        return g.reshape(g.binary("Mul", statistic, ones), (x.shape[0], channels, *(1 for _ in axes)))

    mean = group_mean(x)
    centred = g.binary("Sub", x, spread(mean))
    variance = group_mean(g.binary("Mul", centred, centred))
    deviation = g.unary("Sqrt", g.binary("Add", variance, g.constant(eps, g.wide)))
    rstd = g.unary("Reciprocal", deviation)
    normal = g.affine(centred, spread(rstd))
    g.normalised[rstd.name] = normal
    scale, shift = (None if p is None else _per_channel(g, p, len(x.shape)) for p in (weight, bias))
    return normal if scale is None else g.affine(normal, scale, shift), mean, rstd


def group_norm_backward(g: OnnxGraph, grad: Value, x: Value, rstd: Value, weight: Value | None, groups: int) -> Value:
    """dx."""
    # grad = scale h: what is constant over the pixels stays outside of the sums over them.
    h, scale, shift = g.affine_parts(grad) or (grad, None, None)
    if shift is not None:
        h, scale = grad, None
    h, x = (g.cast(v, g.wide) for v in (h, x))
    scale = None if scale is None else g.cast(scale, g.wide)
    if g.rank_4:
        return g.cast(_backward_by_channels(g, h, scale, x, rstd, weight, groups), grad.dtype)
    return g.cast(_backward_by_rows(g, h, scale, x, rstd, weight, groups), grad.dtype)


def _backward_by_rows(
    g: OnnxGraph, h: Value, scale: Value | None, x: Value, rstd: Value, weight: Value | None, groups: int
) -> Value:
    """own - mean(own) - x' mean(own x') with own = r g and x' = (x - m) r, which is never written down."""
    centred = g.normalised[rstd.name]
    slope = _slope(g, x, rstd, weight, (1, groups, elements(x.shape[1:2]) // groups, 1))
    own = g.binary("Mul", h, slope if scale is None else g.binary("Mul", slope, scale))
    grads = _rows(g, own, groups)
    product = g.binary("Mul", _mean_product(g, grads, centred), g.binary("Mul", rstd, rstd))
    rest = g.binary("Add", g.binary("Mul", centred, product), g.reduce("ReduceMean", grads, [3], True))
    return g.binary("Sub", own, g.reshape(rest, x.shape))


def _backward_by_channels(
    g: OnnxGraph, h: Value, scale: Value | None, x: Value, rstd: Value, weight: Value | None, groups: int
) -> Value:
    """The same with sums of each channel first."""
    normal, axes = g.normalised[rstd.name], list(range(2, len(x.shape)))
    per_group = groups, elements(x.shape[1:2]) // groups
    slope = g.constant(np.ones((1, *per_group)), g.wide)
    for factor in (scale, weight):
        if factor is not None:
            sizes = (factor.shape[0] if len(factor.shape) > 1 else 1, *per_group)
            slope = g.binary("Mul", slope, g.reshape(g.cast(factor, g.wide), sizes))

    def mean(total: Value) -> Value:
        """-r times the group's mean of slope times that of which `total` has each channel's sum, for each channel."""
        sums = g.reshape(total, (x.shape[0], *per_group))
        summed = g.reduce("ReduceSum", g.binary("Mul", sums, slope), [2], True)
        share = g.constant(-groups / elements(x.shape[1:]), g.wide)
        ones = g.constant(np.ones((1, 1, per_group[1])), g.wide)
        return g.reshape(g.binary("Mul", g.binary("Mul", g.binary("Mul", summed, share), rstd), ones), _wide(x))

    of_h = mean(g.reduce("ReduceSum", h, axes, True))
    of_product = mean(g.reduce("ReduceSum", g.binary("Mul", h, normal), axes, True))
    own = g.binary("Mul", h, g.reshape(g.binary("Mul", slope, rstd), _wide(x)))
    return g.binary("Add", own, g.binary("Add", g.binary("Mul", normal, of_product), of_h))


def _wide(x: Value) -> Shape:
    """The shape of one number a sample and channel of an image."""
    return (*x.shape[:2], *(1 for _ in x.shape[2:]))


def _per_channel(g: OnnxGraph, parameter: Value, rank: int) -> Value:
    return g.cast(g.reshape(parameter, (1, *parameter.shape, *([1] * (rank - 2)))), g.wide)
