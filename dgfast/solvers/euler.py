"""Euler's method (EDM, arXiv 2206.00364, algorithm 1 without its correction)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.solver import Call, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.noise_levels import Coordinates


def euler_step(x: Tensor, denoised: Tensor, t: Tensor, t_next: Tensor, coords: Coordinates) -> Tensor:
    """First order: follow the slope at (x, t)."""
    return (x + (t_next - t) * slope(x, denoised, t, coords)).to(x.dtype)


def slope(x: Tensor, denoised: Tensor, t: Tensor, coords: Coordinates) -> Tensor:
    """dx/dt at (x, t) [B, C, H, W], in the wider type of x and t (EDM, algorithm 1, line 4)."""
    a, b = coords.slope(t)
    return a * x - b * denoised


class Euler(Solver):
    """Follows the slope at the beginning of the step."""

    name, order = "euler", 1

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, log_ratio = predict(x, t)
        return euler_step(x, denoised, t, t_next, self.coords), denoised, log_ratio
