"""Group normalisation in operators of ONNX Runtime, for which its CUDA provider alone has kernels.

    GroupNorm       y = a(gamma (x - m) / sqrt(v + eps) + beta),   m and v of the group, a the silu or nothing
    SkipGroupNorm   the same of x + skip, and that sum; skip an image or one number a sample and channel

Both read images [B, H, W, C], and neither returns m and v: where a gradient needs these, the plain form (see
`normalisation`) reads the image less often.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.values import Record, Value

OPERATORS = {"GroupNorm": "com.microsoft", "SkipGroupNorm": "com.microsoft"}
"""Their domain by name."""
_MOST_CHANNELS = 512  # of a group, in that kernel; it takes them two by two
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class GroupNorm:
    """One normalisation, as it was written: what follows it may yet become a part of it."""

    x: Value
    gamma: Value
    beta: Value
    groups: int
    eps: float
    silu: bool = False

    def write(self, g: OnnxGraph) -> Value:
        images = g.transpose(self.x, _TO_NHWC)
        (y,) = g.emit(
            "GroupNorm", [images, self.gamma, self.beta], [images.shape], self.x.dtype,
            groups=self.groups, epsilon=self.eps, activation=int(self.silu), channels_last=1,
        )  # fmt: skip
        result = g.transpose(y, _TO_NCHW)
        g.normalised[result.name] = self
        return result


@dataclass(frozen=True)
class Sum:
    """A sum [B, C, H, W] of an image [B, H, W, C] and of what was added to it, another or [B, C]."""

    total: Value
    image: Value
    skip: Value


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
    x, factor = _unscaled(g, x)
    terms = _terms(g, x)
    if terms and all(g.array(parameter) is not None for parameter in (gamma, beta)):  # else they may depend on x
        image, skip = terms
        added = g.transpose(skip, _TO_NHWC) if skip.shape == x.shape else g.reshape(skip, x.shape[:2])
        g.normalised[g.transpose(x, _TO_NHWC).name] = Sum(x, g.transpose(image, _TO_NHWC), added)
    return GroupNorm(x, gamma, beta, groups, eps / factor**2).write(g)


def with_silu(g: OnnxGraph, y: Value) -> Value | None:
    """silu(y) of a y that is such a normalisation."""
    norm = g.normalised.get(y.name)
    return replace(norm, silu=True).write(g) if isinstance(norm, GroupNorm) and not norm.silu else None


def take_in_sums(g: OnnxGraph, outputs: Sequence[Value]) -> None:
    """Have a normalisation that reads a sum compute it too: in the sum's place, and for all others that read it."""
    written = {record.outputs[0]: record for record in g.records}
    in_place, taken = dict[str, list[Record]](), set[str]()
    for norm in [record for record in g.live(outputs)[0] if record.op == "GroupNorm"]:
        images, *parameters = norm.inputs
        read = g.normalised.get(images)
        if read is None or images in taken:
            continue
        norm.op, norm.inputs = "SkipGroupNorm", (read.image.name, *parameters, read.skip.name)
        norm.outputs.append(images)  # the name of what was the transpose of the sum
        taken.add(images)
        turned = [written[name] for name in (read.image.name, read.skip.name) if name in written]
        back = Record("Transpose", (images,), [read.total.name], {"perm": list(_TO_NCHW)})
        in_place[read.total.name] = [*turned, norm, back]  # before all that reads the sum; what stood later moves up
    moved = [record for old in g.records for record in in_place.get(old.outputs[0], [old])]
    first = {record.outputs[0]: record for record in moved}
    g.records = [record for name, record in first.items() if name not in taken]


def _unscaled(g: OnnxGraph, x: Value) -> tuple[Value, float]:
    """s and c of an x that is c s, c > 0: normalised, they are the same, but for eps. Else x and 1."""
    op, *arguments = g.operands.get(x.name, ("",))
    for s, c in (arguments, arguments[::-1]) if op == "Mul" else ():
        factor = g.array(c)
        if factor is not None and factor.size == 1 and factor.item() > 0 and s.shape == x.shape:
            return s, factor.item()
    return x, 1.0


def _terms(g: OnnxGraph, x: Value) -> list[Value]:
    """An image and what was added to it, another or a number a sample and channel, if x is such a sum."""
    op, *terms = g.operands.get(x.name, ("",))
    for a, b in (terms, terms[::-1]) if op == "Add" else ():
        if a.shape == x.shape and b.shape in (x.shape, (*x.shape[:2], 1, 1)):
            return [a, b]
    return []
