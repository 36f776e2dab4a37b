"""DDIM (arXiv 2010.02502), with as much noise as one wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.solver import Call, Solver

if TYPE_CHECKING:
    from torch import Tensor


def ddim_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None, eta: float
) -> Tensor:
    """Toward the denoised images, with `eta` times the posterior's standard deviation of fresh noise.

    arXiv 2010.02502, equation 12; without noise it is Euler's step in sigma.
    """
    if noise is None:
        return denoised + sigma_next / sigma * (x - denoised)
    spread = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
    kept = (sigma_next**2 - spread**2).sqrt()
    return denoised + kept / sigma * (x - denoised) + spread * noise


class DDIM(Solver):
    """Goes toward the denoised images; its noise is `eta`."""

    name, order, sigma_alone, unit_start, takes_eta = "ddim", 1, True, True, True

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("noise",) if self.config.eta else ()

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, log_ratio = predict(x, t)
        return ddim_step(x, denoised, t, t_next, more.get("noise"), self.config.eta), denoised, log_ratio
