"""Smoothed energy guidance (Hong, arXiv 2408.00760): away from a self whose queries are blurred over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.perturbed import Perturbed, interval_option, layers_option, perturbed_copy

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class SmoothedEnergyGuidance(Perturbed):
    """D' = D + p (D - D_per): in some layers of D_per the queries are blurred over the image.

    An infinite blur, which is the default, makes every query the mean of all: one row of attention for all tokens.
    """

    @dataclass(frozen=True)
    class Options:
        seg_scale: float = option(0.0, "Scale; 0 turns it off.", "p", attribute="weight")
        seg_blur: float | None = option(None, "Blur of the queries, in tokens; default: infinite.", "tokens")
        seg_layers: str | None = layers_option("layers that attend", "the network's middle")
        seg_interval: tuple[float, float] = interval_option()

    name = "smoothed energy guidance"
    formula = "D + p (D - D_per)"
    use = "the same, more gently"

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.seg_blur is not None and config.seg_blur <= 0:
            raise UserError(f"seg_blur {config.seg_blur} must be above 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> SmoothedEnergyGuidance:
        size = networks.denoiser.img_resolution
        height, width = (size, size) if isinstance(size, int) else size
        attend = mean_attention
        if config.seg_blur is not None:
            attend = partial(blurred_attention, config.seg_blur, height / width)
        changes = {"attend": attend}
        reference = perturbed_copy(cls, networks.denoiser, config.seg_layers, "seg_layers", changes)
        return cls(reference, config.seg_scale, config.seg_interval)


def mean_attention(qkv: Tensor) -> Tensor:
    """Attention [B, heads, tokens, C] of the mean query, which is the same for all tokens."""
    from torch.nn import functional as F

    q, k, v = qkv
    return F.scaled_dot_product_attention(q.mean(dim=2, keepdim=True), k, v).expand_as(v)


def blurred_attention(blur: float, aspect: float, qkv: Tensor) -> Tensor:
    """Attention of queries that are blurred over the image, whose height is `aspect` times its width."""
    from torch.nn import functional as F

    q, k, v = qkv
    height = round(math.sqrt(q.shape[2] * aspect))
    rows, columns = (_blur_matrix(blur, length).to(q) for length in (height, q.shape[2] // height))
    image = q.unflatten(2, (height, -1)).movedim(4, 2)  # [B, heads, C, H, W]
    blurred = (rows @ image @ columns.T).movedim(2, 4).flatten(2, 3)
    return F.scaled_dot_product_attention(blurred, k, v)


def _blur_matrix(blur: float, length: int) -> Tensor:
    """What blurs a row of that length: a Gaussian of 6 standard deviations, at the ends reflected."""
    import torch

    size = math.ceil(6 * blur)
    size = min(size + 1 - size % 2, length + 1 - length % 2)
    reach = torch.arange(size) - size // 2
    weights = torch.exp(-0.5 * (reach / blur) ** 2)
    at = (torch.arange(length)[:, None] + reach).abs()
    at = (length - 1) - ((length - 1) - at).abs()
    return torch.zeros(length, length).scatter_add_(1, at, (weights / weights.sum()).expand(length, size))
