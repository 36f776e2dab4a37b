"""CFG-Zero* (Fan et al., arXiv 2503.18886): a best-fitting multiple of the prediction without class, and zero-init."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.spaces import frame, inner, prediction, space_option
from dgfast.guidance.steps import of_step
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

_LEAST = 1e-8  # the published code's


def fitted(denoised: Tensor, reference: Tensor, x: Tensor, sigma: Tensor, space: str = "flow") -> Tensor:
    """The reference [B, C, H, W] whose prediction q is replaced by the multiple a q that is closest to p.

    p is the prediction of `denoised`, and a = <p, q> / |q|^2 (the paper's equation 8).
    """
    p, q = (prediction(space, images, x, sigma) for images in (denoised, reference))
    a = (inner(p, q) / (inner(q, q) + _LEAST)).to(denoised.dtype)
    origin, _ = frame(space, x, sigma)
    return a * reference + (1 - a) * origin


@dataclass(frozen=True, eq=False)
class CFGZeroStar(UnconditionalGuidance):
    """D' = D_u^a + scale (D_c - D_u^a), D_u^a `fitted`; in the first steps the prediction is zero instead.

    Attributes:
        space: of the predictions; the paper's is that of rectified flow.
        zero_steps: so many first steps have a prediction of zero, at both of their points.
        levels, second: see `along`.
    """

    @dataclass(frozen=True)
    class Options:
        zero_star_scale: float = option(1.0, "Scale; 1 turns it off.", "s", attribute="scale")
        zero_star_space: str = space_option("flow")
        zero_init_steps: int = option(0, "So many first steps are without any prediction.", "N", least=0)
        guidance_interval: tuple[float, float] = interval_option()

    space: str = "flow"
    zero_steps: int = 0
    levels: tuple[float, ...] = ()
    second: bool = False

    name = "CFG-Zero*"
    formula = "a D_u + s (D - a D_u), a the best fit"
    use = "for flow models, whose first steps predict badly"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        super().check(config)
        if config.zero_init_steps and config.guidance_interval[1] < float("inf"):
            raise UserError("zero_init_steps are at the highest noise levels, which guidance_interval leaves out")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> CFGZeroStar:
        interval, space = config.guidance_interval, config.zero_star_space
        return cls(cls.conditional(networks), config.zero_star_scale, interval, space, config.zero_init_steps)

    @property
    def needs_plain_steps(self) -> str:
        return "zero_init_steps" if self.zero_steps else ""

    def along(self, levels: Sequence[float], second: bool = False) -> CFGZeroStar:
        steps = len(levels) - 1
        if self.zero_steps >= steps > 0:
            raise UserError(
                f"zero_init_steps {self.zero_steps} of {steps} steps leaves none that predicts: take fewer of them, or "
                "more --steps"
            )
        return replace(self, levels=tuple(levels), second=second) if self.zero_steps else self

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        direction = denoised - fitted(denoised, unconditional, x, sigma, self.space)
        gate = (self.scale - 1) * torch.ones_like(sigma)
        if not self.zero_steps:
            return direction, gate
        steps = [float(step < self.zero_steps) for step in range(len(self.levels) - 1)]
        zero = (of_step(steps, self.levels, self.second, sigma) > 0) & (gate.abs() > 0)  # a file's scale of 1 is off
        origin, _ = frame(self.space, x, sigma)
        direction = torch.where(zero.view(-1, 1, 1, 1), origin - denoised, direction)
        return direction, torch.where(zero, 1.0, gate)
