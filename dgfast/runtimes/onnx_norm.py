"""Normalisations, of groups with the input gradient, in ONNX operations, with statistics in float32.

    y = x' w + b,   x' = (x - m) r,   m and r = 1 / sqrt(v + eps) of the group (Wu and He, arXiv 1803.08494)
    dx = r (g - mean(g) - x' mean(g x')),   g = dy w,   means over the group

What the networks put behind it, a scale and a shift a sample and channel, goes into w and b (see `OnnxGraph.affine`).
ONNX Runtime runs one operation after the other over all of an image, so what counts is how often the image is read and
written. There y is A x + B with A = r w and B = b - m A, one number a channel each, after a mean and a mean of squares
of rows of a group each; its own layer normalisation sums one number at a time and leaves w and b to be done. TensorRT
cannot build images that are reshaped to rows and back: there every sum is first taken per channel, in four dimensions.
"""

import numpy as np

from dgfast.runtimes.onnx_graph import OnnxGraph, Shape, Value, elements

_LEAST_OF_A_MATRIX_PRODUCT = 1024  # numbers of a row from which on a product of row and column beats a sum


def group_norm(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    """y, and mean and r of the groups [B, groups, 1]."""
    wide = g.cast(x, np.float32)
    if not g.rank_4:
        mean, rstd = _moments(g, wide, groups, eps)
        g.normalised[rstd.name] = mean
        return g.cast(_normalised(g, wide, mean, rstd, weight, bias), x.dtype), mean, rstd
    normal, mean, rstd = _by_channels(g, wide, groups, eps)
    g.normalised[rstd.name] = normal
    scale, shift = (None if p is None else _per_channel(g, p, len(x.shape)) for p in (weight, bias))
    y = normal if scale is None else g.affine(normal, scale, shift)
    return g.cast(y, x.dtype), mean, rstd


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


def _moments(g: OnnxGraph, x: Value, groups: int, eps: float) -> tuple[Value, Value]:
    """Mean and r of the groups, [B, groups, 1]."""
    rows = _rows(g, x, groups)
    mean = g.reduce("ReduceMean", rows, [2], True)
    # Rounding may leave less than nothing of a group that is all but constant.
    variance = g.unary("Relu", g.binary("Sub", _mean_product(g, rows, rows), g.binary("Mul", mean, mean)))
    deviation = g.unary("Sqrt", g.binary("Add", variance, g.constant(eps, np.float32)))
    return mean, g.unary("Reciprocal", deviation)


def _normalised(g: OnnxGraph, x: Value, mean: Value, rstd: Value, weight: Value | None, bias: Value | None) -> Value:
    """y as x times one number a channel plus another, so that what follows it can still go into the two."""
    groups, channels = elements(mean.shape[1:]), elements(x.shape[1:2])
    grouped, wide = (1, groups, channels // groups), _wide(x)
    slope, start = (
        g.constant(np.full(grouped, default), np.float32) if p is None else g.cast(g.reshape(p, grouped), np.float32)
        for default, p in ((1, weight), (0, bias))
    )
    scale = g.binary("Mul", rstd, slope)
    shift = g.binary("Sub", start, g.binary("Mul", mean, scale))
    return g.affine(x, g.reshape(scale, wide), g.reshape(shift, wide))


def _rows(g: OnnxGraph, x: Value, groups: int) -> Value:
    return g.reshape(x, (x.shape[0], groups, elements(x.shape[1:]) // groups))


def _mean_product(g: OnnxGraph, a: Value, b: Value) -> Value:
    """Means of the products of two tensors of rows [B, groups, size] -> [B, groups, 1]."""
    batch, groups, size = a.shape[0], elements(a.shape[1:2]), elements(a.shape[2:])
    if size < _LEAST_OF_A_MATRIX_PRODUCT:
        return g.reduce("ReduceMean", g.binary("Mul", a, b), [2], True)
    left, right = (g.reshape(x, (batch, groups, 1, size)) for x in (a, b))
    # Not `g.transpose`, which would make a reshape of it: ONNX Runtime takes a transpose into the product.
    (column,) = g.emit("Transpose", [right], [(batch, groups, size, 1)], np.float32, perm=[0, 1, 3, 2])
    (total,) = g.emit("MatMul", [left, column], [(batch, groups, 1, 1)], np.float32)
    return g.binary("Mul", g.reshape(total, (batch, groups, 1)), g.constant(1 / size, np.float32))


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
    # grad = scale h: what is constant over the pixels stays outside of the sums over them.
    h, scale, shift = g.affine_parts(grad) or (grad, None, None)
    if shift is not None:
        h, scale = grad, None
    h = g.cast(h, np.float32)
    grouped = groups, elements(x.shape[1:2]) // groups
    slope = g.constant(np.ones((1, *grouped)), np.float32)
    for factor in (scale, weight):
        if factor is not None:
            sizes = (factor.shape[0] if len(factor.shape) > 1 else 1, *grouped)
            slope = g.binary("Mul", slope, g.reshape(g.cast(factor, np.float32), sizes))
    backward = _backward_by_channels if g.rank_4 else _backward_by_rows
    return g.cast(backward(g, h, slope, g.cast(x, np.float32), rstd), x.dtype)


def _backward_by_rows(g: OnnxGraph, h: Value, slope: Value, x: Value, rstd: Value) -> Value:
    """own - mean(own) - x' mean(own x') with own = r g and x' = (x - m) r, which is never written down."""
    mean, groups = g.normalised[rstd.name], elements(slope.shape[1:2])
    own = g.binary("Mul", h, g.reshape(g.binary("Mul", slope, rstd), _wide(x)))
    rows, grads = (_rows(g, image, groups) for image in (x, own))
    total = g.reduce("ReduceMean", grads, [2], True)
    product = g.binary("Sub", _mean_product(g, grads, rows), g.binary("Mul", mean, total))
    scale = g.binary("Mul", product, g.unary("Neg", g.binary("Mul", rstd, rstd)))
    shift = g.binary("Sub", g.unary("Neg", g.binary("Mul", mean, scale)), total)
    return g.binary("Add", own, g.reshape(g.affine(rows, scale, shift), x.shape))


def _backward_by_channels(g: OnnxGraph, h: Value, slope: Value, x: Value, rstd: Value) -> Value:
    """The same with sums of each channel first."""
    normal, axes = g.normalised[rstd.name], list(range(2, len(x.shape)))
    grouped: Shape = (x.shape[0], *slope.shape[1:])

    def mean(total: Value) -> Value:
        """-r times the group's mean of slope times that of which `total` has each channel's sum, for each channel."""
        summed = g.reduce("ReduceSum", g.binary("Mul", g.reshape(total, grouped), slope), [2], True)
        share = g.constant(-elements(slope.shape[1:2]) / elements(x.shape[1:]), np.float32)
        ones = g.constant(np.ones((1, 1, *slope.shape[2:])), np.float32)
        return g.reshape(g.binary("Mul", g.binary("Mul", g.binary("Mul", summed, share), rstd), ones), _wide(x))

    of_h = mean(g.reduce("ReduceSum", h, axes, True))
    of_product = mean(g.reduce("ReduceSum", g.binary("Mul", h, normal), axes, True))
    own = g.binary("Mul", h, g.reshape(g.binary("Mul", slope, rstd), _wide(x)))
    return g.binary("Add", own, g.binary("Add", g.binary("Mul", normal, of_product), of_h))


def _wide(x: Value) -> Shape:
    """The shape of one number a sample and channel of an image."""
    return (*x.shape[:2], *(1 for _ in x.shape[2:]))


def _per_channel(g: OnnxGraph, parameter: Value, rank: int) -> Value:
    return g.cast(g.reshape(parameter, (1, *parameter.shape, *([1] * (rank - 2)))), np.float32)
