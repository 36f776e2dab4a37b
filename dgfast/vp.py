"""The map between VE, sigma on images in about [-1, 1], and the VP process in which noise-aware networks were trained.

tau in [0, 1] is the time of the linear-beta VP SDE at the same signal-to-noise ratio (Song et al., arXiv 2011.13456,
beta from 0.1 to 20). Pure functions, meant for float64. Nothing here imports torch, so that what a guidance declares
can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0
COSINE_S = 0.008


def vp_alpha(sigma: Tensor) -> Tensor:
    """Factor that brings an image with noise sigma to the unit-variance scale of the VP process."""
    return (1 + sigma**2).rsqrt()


def vp_time(sigma: Tensor) -> Tensor:
    """tau(sigma), the linear-VP time: 1 at sigma 152.17, 0.01 at sigma 0.0447."""
    slope = BETA_MAX - BETA_MIN
    return ((BETA_MIN**2 + 2 * slope * (sigma**2).log1p()).sqrt() - BETA_MIN) / slope


def vp_sigma(tau: Tensor) -> Tensor:
    """sigma(tau), the inverse of `vp_time`."""
    return (0.5 * (BETA_MAX - BETA_MIN) * tau**2 + BETA_MIN * tau).expm1().sqrt()


def cosine_time(sigma: Tensor) -> Tensor:
    """Time of the cosine schedule (arXiv 2102.09672, equation 17) at noise sigma; ADM's 64x64 classifier reads it."""
    at_zero = COSINE_S / (1 + COSINE_S) * math.pi / 2
    # arccos(cos(at_zero) alpha), without what float32 would lose of it near 1
    angle = ((sigma**2 + math.sin(at_zero) ** 2).sqrt() / math.cos(at_zero)).atan()
    return (1 + COSINE_S) * (2 / math.pi) * angle - COSINE_S


TIME_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {"linear": vp_time, "cosine": cosine_time}


def adm_time_schedule(image_size: int) -> str:
    """The schedule with which ADM's networks of that size, classifiers too, were trained."""
    return "cosine" if image_size == 64 else "linear"
