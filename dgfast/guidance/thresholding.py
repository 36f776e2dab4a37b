"""Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): squeeze an image whose bright pixels leave [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Repair
from dgfast.guidance.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


def quantile(values: Tensor, share: float | Tensor) -> Tensor:
    """The quantile [N, 1] of values [N, K], as `torch.quantile` has it, which no file can hold: by sorting."""
    import torch

    ordered, last = values.sort(dim=1).values, values.shape[1] - 1
    position = torch.as_tensor(share, dtype=values.dtype, device=values.device).reshape(-1, 1) * last
    below = position.floor()
    low, high = (ordered.gather(1, index.clamp(0, last).long().expand(len(values), 1)) for index in (below, below + 1))
    return low + (position - below) * (high - low)


def squeezed(images: Tensor, share: float | Tensor) -> Tensor:
    """Images [B, C, H, W] clamped to [-q, q] and divided by q, their quantile of absolute values, but at least 1."""
    q = quantile(images.abs().flatten(1), share).clamp(min=1).view(-1, 1, 1, 1)
    return images.maximum(-q).minimum(q) / q


@dataclass(frozen=True, eq=False)
class DynamicThreshold(Repair):
    """clamp(D', -q, q) / q, see `squeezed`. For pixels in [-1, 1]; latents have no such range.

    It looks at the image alone, not at what guidance did to it.

    Attributes:
        share: of absolute values that are at most q, such as 0.995; 0 repairs nothing.
    """

    @dataclass(frozen=True)
    class Options:
        dynamic_threshold: float = option(
            0.0, "Share of pixels that keep their contrast, such as 0.995; 0: off.", "p", attribute="share"
        )

    share: float | Tensor

    name = "dynamic thresholding"
    formula = "clamp(D', -q, q) / q, q = max(1, quantile(|D'|, p))"
    cost = "nothing"
    use = "against saturated pixels"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if not 0 <= config.dynamic_threshold <= 1:
            raise UserError(f"dynamic_threshold {config.dynamic_threshold} must lie between 0 and 1")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> DynamicThreshold:
        return cls(config.dynamic_threshold)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.share != 0)

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        import torch

        on = torch.as_tensor(self.share, device=x.device) > 0
        return torch.where(on, squeezed(mixed, self.share), mixed)
