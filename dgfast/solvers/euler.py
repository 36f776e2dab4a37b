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
    from dgfast import ops

    return ops.euler_update(x, denoised, *coords.slope(t), t_next - t)[0]


class Euler(Solver):
    """Follows the slope at the beginning of the step."""

    name, order = "euler", 1

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, log_ratio = predict(x, t)
        return euler_step(x, denoised, t, t_next, self.coords), denoised, log_ratio
