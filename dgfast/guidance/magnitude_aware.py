"""MAMBO-G (arXiv 2508.03442): a smaller scale where the correction is large against the prediction itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.spaces import inner, prediction, space_option
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

_TINY = 1e-30


def magnitude_damping(
    denoised: Tensor, reference: Tensor, x: Tensor, sigma: Tensor, alpha: float, space: str = "flow"
) -> Tensor:
    """The factor [B] on scale - 1: exp(-alpha |p - q| / |q|), p and q being the predictions of both."""
    p, q = (prediction(space, images, x, sigma) for images in (denoised, reference))
    ratio = (inner(p - q, p - q) / inner(q, q).clamp(min=_TINY)).sqrt()
    return (-alpha * ratio).exp().flatten().to(sigma.dtype)


@dataclass(frozen=True, eq=False)
class MagnitudeAwareGuidance(UnconditionalGuidance):
    """D' = D_c + (scale - 1) exp(-alpha |p_c - p_u| / |p_u|) (D_c - D_u), norms of each sample.

    Attributes:
        alpha: how strongly the scale is damped, 0 not at all.
        space: of the predictions; the paper's is that of rectified flow.
    """

    @dataclass(frozen=True)
    class Options:
        mambo_scale: float = option(1.0, "Largest scale; 1 turns it off.", "s", attribute="scale")
        mambo_alpha: float = option(8.0, "How strongly large corrections are damped.", "alpha")
        mambo_space: str = space_option("flow")
        guidance_interval: tuple[float, float] = interval_option()

    alpha: float = 8.0
    space: str = "flow"

    name = "magnitude-aware guidance"
    formula = "D + (s - 1) exp(-alpha |p - p_u| / |p_u|) (D - D_u)"
    use = "for large scales, whose first steps go astray"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        super().check(config)
        if config.mambo_alpha < 0:
            raise UserError(
                f"mambo_alpha {config.mambo_alpha} must be at least 0: below, the scale grows without bound"
            )

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> MagnitudeAwareGuidance:
        own = config.mambo_alpha, config.mambo_space
        return cls(cls.conditional(networks), config.mambo_scale, config.guidance_interval, *own)

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        damping = magnitude_damping(denoised, unconditional, x, sigma, self.alpha, self.space)
        return denoised - unconditional, (self.scale - 1) * damping
