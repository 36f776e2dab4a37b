"""Heun's method, and with alpha below 1 the other methods of two points (EDM, arXiv 2206.00364, algorithm 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.euler import euler_step, slope
from dgfast.solvers.solver import Call, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.noise_levels import Coordinates


def heun_step(
    x: Tensor,
    denoised: Tensor,
    t: Tensor,
    t_next: Tensor,
    denoise: Callable[[Tensor, Tensor], Tensor],
    coords: Coordinates,
    alpha: float = 1.0,
) -> Tensor:
    """Second order: average the slope at (x, t) with that at a share `alpha` of the step (EDM, algorithm 3)."""
    t_prime, w = t + alpha * (t_next - t), 0.5 / alpha
    d = slope(x, denoised, t, coords)
    x_prime = (x + (t_prime - t) * d).to(x.dtype)
    d_prime = slope(x_prime, denoise(x_prime, t_prime), t_prime, coords)
    return (x + (t_next - t) * ((1 - w) * d.to(x.dtype) + w * d_prime)).to(x.dtype)


class Heun(Solver):
    """Averages the slopes at two points; the step to sigma 0, where no network can look, is Euler's."""

    name, order, points = "heun", 2, 2

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, log_ratio = predict(x, t)
        if correct is None:
            return euler_step(x, denoised, t, t_next, self.coords), denoised, log_ratio
        second = correct
        x = heun_step(x, denoised, t, t_next, lambda x, t: second(x, t)[0], self.coords, self.config.alpha)
        return x, denoised, log_ratio

    def any_step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        going_on = t_next > 0
        denoised, log_ratio = predict(x, t)

        def predicted(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            return denoised, log_ratio

        last, _, _ = self.step(x, t, t_next, predicted, None, more)
        usual, _, _ = self.step(x, t, torch.where(going_on, t_next, t), predicted, correct, more)
        return torch.where(going_on, usual, last), denoised, log_ratio
