"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.solver import LAST, Call, Solver

if TYPE_CHECKING:
    from torch import Tensor


def dpmpp_2m_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, denoised_last: Tensor, sigma_last: Tensor
) -> Tensor:
    """Second order from two steps' denoised images, exact in the linear part (arXiv 2211.01095, algorithm 2).

    Args:
        denoised_last, sigma_last: the last step's; sigma_last infinite makes this step one of first order.

    The step to sigma_next = 0 ends at `denoised` itself, as in the published code's last step of first order.
    """
    import torch

    h, h_last = (sigma / sigma_next).log(), (sigma_last / sigma).log()
    ratio = torch.where(sigma_next > 0, h / (2 * h_last), 0.0)  # 1 / (2 r); infinite h marks the last step
    extrapolated = denoised + ratio * (denoised - denoised_last)
    shrink = sigma_next / sigma
    return shrink * x + (1 - shrink) * extrapolated


class DPMpp2M(Solver):
    """Extrapolates the denoised images from the last step's and this one's."""

    name, order, sigma_alone, plain_steps = "dpmpp-2m", 2, True, False

    @property
    def inputs(self) -> tuple[str, ...]:
        return LAST

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        denoised, log_ratio = predict(x, t)
        return dpmpp_2m_step(x, denoised, t, t_next, *(more[name] for name in LAST)), denoised, log_ratio
