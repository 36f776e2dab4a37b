"""Rescaled guidance (Lin et al., arXiv 2305.08891, section 3.4): give back the spread that guidance has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Repair
from dgfast.guidance.options import option
from dgfast.guidance.spaces import IMAGE, frame, inner, space_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


def rescaled(mixed: Tensor, plain: Tensor, x: Tensor, sigma: Tensor, share: float | Tensor, space: str = "v") -> Tensor:
    """`mixed` [B, C, H, W] with its prediction p' times share std(p) / std(p') + 1 - share (equations 15 and 16).

    Deviations are of all pixels and channels of a sample; the mean stays in what is multiplied.
    """
    origin, _ = frame(space, x, sigma)
    p, q = origin - plain, origin - mixed  # the unit does not matter: it is the same above and below
    before, after = (
        inner(centred, centred).sqrt() for centred in (one - one.mean(IMAGE, keepdim=True) for one in (p, q))
    )
    excess = share * (before / after.clamp(min=1e-30) - 1)
    return (mixed - excess * q).to(mixed.dtype)


@dataclass(frozen=True, eq=False)
class Rescale(Repair):
    """p' (share std(p) / std(p') + 1 - share), see `rescaled`.

    Attributes:
        share: phi; 0 repairs nothing.
        space: of the predictions; the paper's is the velocity v, whose spread is about one at every noise level.
    """

    @dataclass(frozen=True)
    class Options:
        cfg_rescale: float = option(
            0.0, "Share of the spread that is given back, to 1; 0: off.", "phi", attribute="share"
        )
        rescale_space: str = space_option("v")

    share: float | Tensor
    space: str = "v"

    name = "rescaling"
    formula = "p' (phi std(p) / std(p') + 1 - phi)"
    cost = "nothing"
    use = "against overexposed images at large scales"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if not 0 <= config.cfg_rescale <= 1:
            raise UserError(f"cfg_rescale {config.cfg_rescale} must lie between 0 and 1")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> Rescale:
        return cls(config.cfg_rescale, config.rescale_space)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.share != 0)

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        return rescaled(mixed, plain, x, sigma, self.share, self.space)
