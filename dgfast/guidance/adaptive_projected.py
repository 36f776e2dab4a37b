"""Adaptive projected guidance, APG (Sadat et al., arXiv 2410.02416): less of what is parallel to the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.spaces import IMAGE, frame, inner, space_option
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.memory import Memory
    from dgfast.networks import Networks

OVER = {"image": IMAGE, "pixel": (1,)}
_TINY = 1e-30


def projected(
    difference: Tensor, prediction: Tensor, eta: float, threshold: float, dims: tuple[int, ...] = IMAGE
) -> Tensor:
    """`difference` no longer than `threshold`, and `eta` times its part along `prediction` (the paper's algorithm 1).

    Args:
        difference, prediction: [B, C, H, W] in one space.
        threshold: of the norm over `dims`; 0: none.
        dims: over which norms and the inner product are taken.

    Returns:
        [B, C, H, W] in the type of `difference`; the inner products are in float64.
    """
    d = difference.double()
    if threshold:
        d = d * (threshold / inner(d, d, dims).sqrt().clamp(min=_TINY)).clamp(max=1)
    along = inner(d, prediction, dims) / inner(prediction, prediction, dims).clamp(min=_TINY) * prediction
    return (d + (eta - 1) * along).to(difference.dtype)


@dataclass(frozen=True, eq=False)
class AdaptiveProjectedGuidance(UnconditionalGuidance):
    """D' = D_c + (scale - 1) d, d being D_c - D_u `projected`, with momentum.

    The momentum is m_k = (p_c - p_u) + momentum m_(k-1), in the space of the predictions p, of the calls k at the
    solver's first points: the second ones read it, and leave it as it is. It begins anew with every trajectory.

    Attributes:
        eta: share of the part along the prediction; 1 keeps all of it, 0 is the paper's.
        threshold: the most that the norm of d may be; 0: none. It grows with the square root of C H W.
        momentum: between -1 and 1; the paper's is negative. 0: none.
        space: of the predictions; the paper's is that of the denoised image.
        over: "image", or "pixel" for norms and projections over the channels alone.
        memory: m, inside of a function that `memory.remembering` made.
    """

    @dataclass(frozen=True)
    class Options:
        apg_scale: float = option(1.0, "Scale; 1 turns it off.", "s", attribute="scale")
        apg_eta: float = option(0.0, "Share of what is parallel to the prediction.", "eta")
        apg_threshold: float = option(0.0, "Largest norm of D - D_u; 0: any.", "r")
        apg_momentum: float = option(
            0.0, "Of D - D_u, from step to step; below 0 for contrast.", "beta", exported=False
        )
        apg_space: str = space_option("x0")
        apg_over: str = option("image", "Over what norms are taken.", choices=tuple(OVER))
        guidance_interval: tuple[float, float] = interval_option()

    eta: float = 0.0
    threshold: float = 0.0
    momentum: float = 0.0
    space: str = "x0"
    over: str = "image"
    memory: Memory | None = None

    name = "adaptive projected guidance"
    formula = "D + (s - 1) (what of D - D_u is not along D)"
    use = "for large scales without saturated colours"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        super().check(config)
        if config.apg_threshold < 0:
            raise UserError(f"apg_threshold {config.apg_threshold} must be at least 0")
        if not abs(config.apg_momentum) < 1:
            raise UserError(
                f"apg_momentum {config.apg_momentum} must lie between -1 and 1: beyond, it grows without bound"
            )

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> AdaptiveProjectedGuidance:
        denoiser = cls.conditional(networks)
        if config.apg_over == "pixel" and networks.denoiser.img_channels == 1:
            raise UserError("apg_over pixel: this network's images have one channel, which is parallel to any other")
        return cls(
            denoiser, config.apg_scale, config.guidance_interval, config.apg_eta,
            config.apg_threshold, config.apg_momentum, config.apg_space, config.apg_over,
        )  # fmt: skip

    @property
    def remembers(self) -> bool:
        return self.momentum != 0

    @property
    def needs_plain_steps(self) -> str:
        return "apg_momentum" if self.remembers else ""

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        origin, unit = frame(self.space, x, sigma)
        difference = (unconditional - denoised) / unit
        if self.remembers:
            assert self.memory is not None, "momentum needs a function of `memory.remembering`"
            self.memory.kept = difference = difference + self.momentum * self.memory.kept
        kept = projected(difference, (origin - denoised) / unit, self.eta, self.threshold, OVER[self.over])
        return -unit * kept, (self.scale - 1) * torch.ones_like(sigma)
