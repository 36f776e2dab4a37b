"""Tangential damping, TCFG (Kwon et al., arXiv 2503.18137): leave out what the two predictions do not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.guidance.options import option
from dgfast.guidance.spaces import frame, inner, space_option
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

_TINY = 1e-30


def dropped(denoised: Tensor, reference: Tensor, x: Tensor, sigma: Tensor, space: str = "eps") -> Tensor:
    """What the reference's prediction [B, C, H, W] has across the first right singular vector of both predictions.

    Added to the reference, it leaves the prediction's part along that vector (the paper's equation 9). In closed form:
    with p and q the predictions and u = (a, b) the first left singular vector, the second right one is along a q - b p.
    At high noise p and q are nearly equal, so all of it is written by their difference d. Nothing is dropped where no
    vector is the first, the two being orthogonal and of one length.
    """
    import torch

    origin, _ = frame(space, x, sigma)
    p, d = origin - denoised, denoised - reference  # the unit does not matter: what is dropped has p's and d's
    pp, pd, dd = inner(p, p), inner(p, d), inner(d, d)
    pq, h = pp + pd, pd + dd / 2  # h: (|q|^2 - |p|^2) / 2
    root = (h**2 + pq**2).sqrt()
    near = torch.where(pq > 0, h**2 / (root + pq).clamp(min=_TINY), root - pq)  # root - pq, without cancellation
    a = torch.where(h > 0, pq, root - h)
    a_less_b = torch.where(h > 0, -h - near, near - h)
    across = a_less_b * p + a * d
    share = (a_less_b * pq + a * (pd + dd)) / inner(across, across).clamp(min=_TINY)
    return (share * across).to(denoised.dtype)


@dataclass(frozen=True, eq=False)
class TangentialGuidance(UnconditionalGuidance):
    """D' = D_u' + scale (D_c - D_u'), D_u' being D_u with the rest of its prediction `dropped`.

    Attributes:
        space: of the predictions; the paper's is the score's, eps.
    """

    @dataclass(frozen=True)
    class Options:
        tcfg_scale: float = option(1.0, "Scale; 1 turns it off.", "s", attribute="scale")
        tcfg_space: str = space_option("eps")
        guidance_interval: tuple[float, float] = interval_option()

    space: str = "eps"

    name = "tangential damping"
    formula = "D_u' + s (D - D_u'), D_u' along what D and D_u share"
    use = "for fewer artefacts of the prediction without class"

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> TangentialGuidance:
        return cls(cls.conditional(networks), config.tcfg_scale, config.guidance_interval, config.tcfg_space)

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        rest = dropped(denoised, unconditional, x, sigma, self.space)
        return denoised - unconditional - rest, (self.scale - 1) * torch.ones_like(sigma)
