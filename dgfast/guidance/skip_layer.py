"""Skip-layer guidance, or spatiotemporal skip (STG, arXiv 2411.18664): away from a self with layers left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.guidance.options import option
from dgfast.guidance.perturbed import Perturbed, interval_option, layers_option, perturbed_copy

if TYPE_CHECKING:
    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class SkipLayerGuidance(Perturbed):
    """D' = D + p (D - D_per): D_per leaves out blocks of a transformer, or the attention in blocks of a U-Net."""

    @dataclass(frozen=True)
    class Options:
        slg_scale: float = option(0.0, "Scale; 0 turns it off.", "p", attribute="weight")
        slg_layers: str | None = layers_option("blocks", "three from 7/24 of the depth on, or a U-Net's middle")
        slg_interval: tuple[float, float] = interval_option()

    name = "skip-layer guidance"
    formula = "D + p (D - D_per)"
    use = "the same, for transformers"

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> SkipLayerGuidance:
        changes = {"skipped": True, "attend": None}
        reference = perturbed_copy(cls, networks.denoiser, config.slg_layers, "slg_layers", changes)
        return cls(reference, config.slg_scale, config.slg_interval)
