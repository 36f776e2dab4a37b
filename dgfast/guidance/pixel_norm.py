"""CFGNorm, of ComfyUI's nodes: no pixel's norm over the channels grows beyond that of the plain prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Repair
from dgfast.guidance.options import option
from dgfast.guidance.spaces import inner

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


def within_norm(mixed: Tensor, plain: Tensor, dims: tuple[int, ...], limit: float | Tensor = 1.0) -> Tensor:
    """The factor [B, ...] of 1 and less that makes the norm of `mixed` over `dims` at most `limit` that of `plain`."""
    import torch

    most, length = limit * inner(plain, plain, dims).sqrt(), inner(mixed, mixed, dims).sqrt()
    return torch.where(length > most, most / length.clamp(min=1e-30), 1.0)


@dataclass(frozen=True, eq=False)
class PixelNorm(Repair):
    """D' (1 - share + share min(1, |D| / |D'|)), norms over the channels at each pixel.

    Attributes:
        share: 0 repairs nothing, 1 is ComfyUI's rule at its default. Its `strength` multiplies the whole image.
    """

    @dataclass(frozen=True)
    class Options:
        cfg_norm: float = option(
            0.0, "Share of the norm's excess, a pixel, that is undone, to 1; 0: off.", "k", attribute="share"
        )

    share: float | Tensor

    name = "norm limit of pixels"
    formula = "D' (1 - k + k min(1, |D| / |D'|)) at each pixel"
    cost = "nothing"
    use = "against glaring pixels"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if not 0 <= config.cfg_norm <= 1:
            raise UserError(f"cfg_norm {config.cfg_norm} must lie between 0 and 1")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> PixelNorm:
        return cls(config.cfg_norm)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.share != 0)

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        excess = self.share * (1 - within_norm(mixed, plain, (1,)))
        return (mixed - excess * mixed).to(mixed.dtype)
