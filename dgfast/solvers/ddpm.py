"""Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.solver import Call, Solver
from dgfast.vp import vp_alpha

if TYPE_CHECKING:
    from torch import Tensor


def ancestral_step(
    x: Tensor, denoised: Tensor, shift: Tensor, variance: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor
) -> Tensor:
    """A draw from DDPM's p(x_next | x), without noise in the step to sigma_next = 0 (arXiv 2006.11239, algorithm 2).

    Args:
        shift: what guidance adds to the mean. variance: of the step. Both [B, C, H, W], in VP coordinates, where
            images have about unit variance.
        noise: unit normal [B, C, H, W].
    """
    import torch

    mean = denoised + (sigma_next / sigma) ** 2 * (x - denoised)
    spread = torch.where(sigma_next > 0, variance.sqrt(), 0.0)
    return mean + (shift + spread * noise) / vp_alpha(sigma_next)


class DDPM(Solver):
    """Draws each state anew, with the network's own variance where it learns one."""

    name, order, sigma_alone, unit_start = "ddpm", 1, True, True
    function, plain_steps = "posterior", False

    @property
    def inputs(self) -> tuple[str, ...]:
        return "noise", "log_least", "log_most"

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, shift, variance, log_ratio = predict(x, t, more["log_least"], more["log_most"])
        return ancestral_step(x, denoised, shift, variance, t, t_next, more["noise"]), denoised, log_ratio
