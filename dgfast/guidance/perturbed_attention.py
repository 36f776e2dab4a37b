"""Perturbed-attention guidance (Ahn et al., arXiv 2403.17377): away from a self whose pixels do not look around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.guidance.options import option
from dgfast.guidance.perturbed import Perturbed, interval_option, layers_option, perturbed_copy

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class PerturbedAttentionGuidance(Perturbed):
    """D' = D + p (D - D_per): in some layers of D_per each token attends to itself alone (the identity for a matrix).

    p is what diffusers' pipelines call pag_scale; the scale of the paper's own scripts is p + 1.
    """

    @dataclass(frozen=True)
    class Options:
        pag_scale: float = option(0.0, "Scale; 0 turns it off. The paper's scripts' is p + 1.", "p", attribute="weight")
        pag_layers: str | None = layers_option("layers that attend", "the network's middle")
        pag_interval: tuple[float, float] = interval_option()

    name = "perturbed-attention guidance"
    formula = "D + p (D - D_per)"
    use = "to sharpen structure, without classes or a second network"

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> PerturbedAttentionGuidance:
        changes = {"attend": values}
        reference = perturbed_copy(cls, networks.denoiser, config.pag_layers, "pag_layers", changes)
        return cls(reference, config.pag_scale, config.pag_interval)


def values(qkv: Tensor) -> Tensor:
    """What attention gives where every token attends to itself alone."""
    return qkv[2]
