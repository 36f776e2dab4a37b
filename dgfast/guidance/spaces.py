"""The spaces in which a network's prediction can be written, for rules that are not linear in it.

All of them are affine in the denoised image D at fixed noisy image and noise level, D = origin - unit p. So mixing by
fixed weights is the same in each of them; a norm, an angle or a standard deviation is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgfast.guidance.options import option

if TYPE_CHECKING:
    from torch import Tensor

SPACES = ("x0", "eps", "v", "flow")
"""The denoised image itself; the noise, (x - D) / sigma; the velocity of the VP process (arXiv 2202.00512); that of
rectified flow, noise minus image (arXiv 2209.03003)."""
IMAGE = (1, 2, 3)
"""The dimensions of one sample of [B, C, H, W]."""


def space_option(default: str) -> str:
    """The option of a guidance that is computed in one of the spaces; `default` is where it was published."""
    return option(default, "Of which prediction it takes norms and angles.", choices=SPACES)


def frame(space: str, x: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Origin [B, C, H, W] and unit [B, 1, 1, 1] of the space at noisy images x [B, C, H, W] of noise levels sigma [B].

    The origin is the denoised image whose prediction is zero.
    """
    s = sigma.view(-1, 1, 1, 1)
    if space == "x0":
        return 0.0, -1.0
    if space == "eps":
        return x, s
    if space == "v":
        return x / (1 + s**2), s / (1 + s**2).sqrt()
    return x / (1 + s), s / (1 + s)


def prediction(space: str, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The prediction p [B, C, H, W] of that space for denoised images D."""
    origin, unit = frame(space, x, sigma)
    return (origin - denoised) / unit


def inner(a: Tensor, b: Tensor, dims: tuple[int, ...] = IMAGE) -> Tensor:
    """The inner product over these dimensions, which stay as sizes of 1, in float64."""
    return (a.double() * b.double()).sum(dims, keepdim=True)
