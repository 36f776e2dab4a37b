"""Autoguidance (Karras et al., arXiv 2406.02507): guide a net by a worse version of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.compose import Denoiser
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class Autoguidance(Guidance):
    """D' = D_ref + weight (D - D_ref), written as the correction (weight - 1) (D - D_ref) of D.

    Attributes:
        reference: a smaller or less trained denoiser of the same data, with the same conditioning; or one without
            classes, which makes it classifier-free guidance by a network of its own, as in EDM2.
        weight: 1 guides nothing; EDM2's presets use 1.7 to 2.9.
    """

    @dataclass(frozen=True)
    class Options:
        autoguidance: float = option(1.0, "Weight of guidance by a worse net; 1 turns it off.", "w", attribute="weight")

    reference: Denoiser
    weight: float | Tensor

    name = "autoguidance"
    formula = "D_ref + w (D - D_ref)"
    cost = "1 forward of the reference net"
    use = "to correct the score net by a worse one"
    roles = ("reference",)
    evaluations, mixes_velocities = 1, True

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> Autoguidance:
        reference, net = cls.needed(networks.reference, "reference"), networks.denoiser
        for name, unit in (("img_channels", "channels"), ("img_resolution", "pixels a side"), ("label_dim", "classes")):
            own, its = getattr(net, name), getattr(reference, name, None)
            if its not in (None, own) and (name, its) != ("label_dim", 0):
                raise UserError(
                    f"{cls.name}: the reference network knows {its} {unit}, the score network {own}; "
                    "give one for the same images"
                )
        return cls(reference, config.autoguidance)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.weight != 1)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        import torch

        worse = self.reference(x, sigma, class_labels).to(denoised.dtype)
        return denoised - worse, (self.weight - 1) * torch.ones_like(sigma), None
