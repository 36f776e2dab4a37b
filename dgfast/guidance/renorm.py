"""RenormCFG, of Lumina-Image 2.0's sampler: no prediction's norm grows beyond a multiple of the plain one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Repair
from dgfast.guidance.options import option
from dgfast.guidance.pixel_norm import within_norm
from dgfast.guidance.spaces import IMAGE, frame, space_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class Renorm(Repair):
    """p' min(1, limit |p| / |p'|), norms of each sample over all pixels and channels.

    Attributes:
        limit: 0 repairs nothing.
        space: of the predictions p; ComfyUI's node has the noise, eps.
    """

    @dataclass(frozen=True)
    class Options:
        renorm: float = option(0.0, "Largest growth of the norm, 1 for none; 0: off.", "c", attribute="limit")
        renorm_space: str = space_option("eps")

    limit: float | Tensor
    space: str = "eps"

    name = "norm limit"
    formula = "p' min(1, c |p| / |p'|)"
    cost = "nothing"
    use = "against large scales that throw images off"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.renorm < 0:
            raise UserError(f"renorm {config.renorm} must be at least 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> Renorm:
        return cls(config.renorm, config.renorm_space)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.limit != 0)

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        import torch

        origin, _ = frame(self.space, x, sigma)
        p, q = origin - plain, origin - mixed
        on = torch.as_tensor(self.limit, device=x.device) > 0
        excess = torch.where(on, 1 - within_norm(q, p, IMAGE, self.limit), 0.0)
        return (mixed + excess * q).to(mixed.dtype)
