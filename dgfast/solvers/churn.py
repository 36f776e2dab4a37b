"""Churn: noise added anew before a step (EDM, arXiv 2206.00364, algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.noise_levels import Coordinates


def churn(x: Tensor, t: Tensor, t_hat: Tensor, noise: Tensor, S_noise: Tensor | float, coords: Coordinates) -> Tensor:
    """Raise the noise level of x from sigma(t) to sigma(t_hat) with fresh unit noise (EDM, algorithm 2, line 6)."""
    added = (coords.sigma(t_hat) ** 2 - coords.sigma(t) ** 2).clip(min=0).sqrt()
    return (coords.s(t_hat) / coords.s(t) * x + added * coords.s(t_hat) * S_noise * noise).to(x.dtype)
