"""Group normalisation in operators of ONNX Runtime, for which its CUDA provider alone has kernels.

    GroupNorm       y = a(gamma (x - m) / sqrt(v + eps) + beta),   m and v of the group, a the silu or nothing
    SkipGroupNorm   the same of x + skip, skip one number a sample and channel

Both read images [B, H, W, C], and neither returns m and v: where a gradient needs these, the plain form (see
`normalisation`) reads the image less often.
"""

from dataclasses import dataclass, replace

import numpy as np

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.values import Value, elements

OPERATORS = {"GroupNorm": "com.microsoft", "SkipGroupNorm": "com.microsoft"}
"""Their domain by name."""
_MOST_CHANNELS = 512  # of a group, in that kernel; it takes them two by two
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class GroupNorm:
    """One normalisation, as it was written: what follows it may yet become a part of it.

    Attributes:
        skip: what is added to x before, [B, C, 1, 1].
    """

    x: Value
    skip: Value | None
    gamma: Value
    beta: Value
    groups: int
    eps: float
    silu: bool = False

    def write(self, g: OnnxGraph) -> Value:
        images, parameters = g.transpose(self.x, _TO_NHWC), [self.gamma, self.beta]
        added = [] if self.skip is None else [g.cast(g.reshape(self.skip, self.x.shape[:2]), self.x.dtype)]
        (y,) = g.emit(
            "SkipGroupNorm" if added else "GroupNorm", [images, *parameters, *added], [images.shape], self.x.dtype,
            groups=self.groups, epsilon=self.eps, activation=int(self.silu), channels_last=1,
        )  # fmt: skip
        result = g.transpose(y, _TO_NCHW)
        g.normalised[result.name] = self
        return result


def group_norm(
    g: OnnxGraph, x: Value, weight: Value | None, bias: Value | None, groups: int, eps: float
) -> Value | None:
    """y of an image; None where the operator has no kernel for it."""
    channels = x.shape[1]
    if len(x.shape) != 4 or not isinstance(channels, int):
        return None
    size = channels // groups
    if size % 2 or size > _MOST_CHANNELS:
        return None
    gamma, beta = (
        g.constant(np.full(channels, default), np.float32) if p is None else g.cast(p, np.float32)
        for default, p in ((1, weight), (0, bias))
    )
    first, skip = _summands(g, x)
    return GroupNorm(first, skip, gamma, beta, groups, float(eps)).write(g)


def with_silu(g: OnnxGraph, y: Value) -> Value | None:
    """silu(y) of a y that is such a normalisation."""
    norm = g.normalised.get(y.name)
    return replace(norm, silu=True).write(g) if isinstance(norm, GroupNorm) else None


def _summands(g: OnnxGraph, x: Value) -> tuple[Value, Value | None]:
    """An image and what was added to it for each sample and channel, if x is such a sum."""
    summands = g.sums.get(x.name)
    for a, b in (summands, summands[::-1]) if summands else ():
        if a.shape == x.shape and b.shape == (*x.shape[:2], 1, 1) and elements(x.shape[2:]) > 1:
            return a, b
    return x, None
