"""Tensors as samples x pixels x channels, the channels next to each other in memory: what generated code loops over."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Types that generated code reads and writes, and C's names for them."""


@dataclass(frozen=True)
class Space:
    """A range of loops: the pixels of a sample (1 for a vector), and the channels of a pixel."""

    pixels: int
    channels: int


@dataclass(frozen=True)
class Strides:
    """Elements between two samples, pixels and channels; 0 where one value serves them all."""

    sample: int
    pixel: int
    channel: int


Roles = tuple[str, ...]
"""What each dimension of a tensor is: b(atch), c(hannel), h, w, p(ixel), or n: samples and pixels in one."""


def roles(value: Tensor, batch: int) -> Roles | None:
    """The dimensions of a tensor whose channels lie next to each other; None for any other."""
    shape, stride = value.shape, value.stride()
    if len(shape) == 4 and (shape[1] == 1 or stride[1] == 1):
        return "b", "c", "h", "w"
    if len(shape) == 3:
        return ("b", "c", "p") if stride[1] == 1 and shape[1] > 1 else ("b", "p", "c")
    if len(shape) == 2:
        return ("b", "c") if shape[0] in (1, batch) else ("n", "c")
    return ("c",) if len(shape) == 1 else None


def space(value: Tensor, batch: int) -> Space | None:
    """The loops over a tensor of `batch` samples that lies in memory without gaps; None for any other."""
    named = roles(value, batch)
    if named is None or value.dtype not in DTYPES:
        return None
    sizes = dict(zip(named, value.shape, strict=True))
    if "n" not in sizes and sizes.get("b") != batch:
        return None
    pixels = sizes.get("h", 1) * sizes.get("w", 1) * sizes.get("p", 1)
    if "n" in sizes:
        if sizes["n"] % batch:
            return None
        pixels = sizes["n"] // batch
    found, lies = Space(pixels, sizes["c"]), strides(value, value, batch)
    dense = Strides(pixels * found.channels, found.channels, 1)
    return found if found.channels > 1 and lies is not None and _agree(lies, dense, found, batch) else None


def strides(value: Tensor, like: Tensor, batch: int) -> Strides | None:
    """How to read a tensor that is broadcast to another one; None where it takes more strides than three."""
    named = roles(like, batch)
    if named is None or value.dim() > len(named):
        return None
    whole = dict(zip(named, like.shape, strict=True))
    found, sizes = dict.fromkeys("bchwpn", 0), dict.fromkeys("bchwpn", 1)
    for role, size, stride in zip(named[len(named) - value.dim() :], value.shape, value.stride(), strict=True):
        sizes[role], found[role] = size, stride if size > 1 else 0
    sides = sizes["h"], sizes["w"]
    if sides not in ((1, 1), (whole.get("h", 1), whole.get("w", 1))):
        return None
    if min(sides) > 1 and found["h"] != sizes["w"] * found["w"]:
        return None
    pixel = found["w"] or found["h"] or found["p"] or found["n"]
    return Strides(found["b"] or found["n"] * (sizes["n"] // batch), pixel, found["c"])


def _agree(found: Strides, wanted: Strides, size: Space, samples: int) -> bool:
    """Whether they say the same where it matters: a stride along a dimension of size 1 says nothing."""
    return (
        (samples == 1 or found.sample == wanted.sample)
        and (size.pixels == 1 or found.pixel == wanted.pixel)
        and found.channel == wanted.channel
    )
