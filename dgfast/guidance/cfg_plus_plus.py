"""CFG++ (Chung et al., arXiv 2406.08070): renoise with the prediction without class, as a scale for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.steps import of_step
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

OFF = -1.0
"""The scale of an exported file that guides nothing: 0 and 1 both guide."""


def step_factors(levels: Sequence[float]) -> tuple[float, ...]:
    """1 / (1 - sigma' / sigma) of each step from sigma to sigma', through levels of which 0 is the last.

    A step of Euler's or of DDIM toward D_l = D_u + l (D_c - D_u), renoised with D_u in the place of D_l, is one under
    classifier-free guidance of scale l times this factor.
    """
    return tuple(1 / (1 - sigma_next / sigma) for sigma, sigma_next in pairwise(levels))


@dataclass(frozen=True, eq=False)
class CFGPlusPlus(UnconditionalGuidance):
    """D' = D_u + s (D_c - D_u) with s = scale / (1 - sigma' / sigma) in the step from sigma to sigma'.

    The same s holds at Heun's second point, of which the paper says nothing. Churn leaves it alone: it is that of the
    plan's levels.

    Attributes:
        scale: from 0, the unconditional samples, to 1; it guides at 1 too.
        levels, second: see `along`.
    """

    @dataclass(frozen=True)
    class Options:
        cfgpp_scale: float | None = option(
            None, "From 0 to 1, the scale of CFG's 1 to about 12; it guides at 1 too.", "l", attribute="scale", off=OFF
        )
        guidance_interval: tuple[float, float] = interval_option()

    levels: tuple[float, ...] = ()
    second: bool = False

    name = "CFG++"
    formula = "D_u + l / (1 - sigma' / sigma) (D - D_u)"
    use = "for classes at small scales, without CFG's saturated colours"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        super().check(config)
        if config.cfgpp_scale is not None and not 0 <= config.cfgpp_scale <= 1:
            raise UserError(f"cfgpp_scale {config.cfgpp_scale} must lie between 0 and 1; beyond, there is cfg_scale")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> CFGPlusPlus:
        assert config.cfgpp_scale is not None, "it is on"
        return cls(cls.conditional(networks), config.cfgpp_scale, config.guidance_interval)

    @property
    def needs_plain_steps(self) -> str:
        return "cfgpp_scale"

    def along(self, levels: Sequence[float], second: bool = False) -> CFGPlusPlus:
        return replace(self, levels=tuple(levels), second=second)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return self.reaches(sigma_low, sigma_high)

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        factors = of_step(step_factors(self.levels), self.levels, self.second, sigma)
        off = torch.as_tensor(self.scale, device=sigma.device) < 0
        return denoised - unconditional, torch.where(off, 0.0, self.scale * factors - 1)
