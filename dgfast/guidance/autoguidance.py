"""Autoguidance (Karras et al., arXiv 2406.02507): guide a net by a worse version of itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgfast.guidance.compose import Denoiser


@dataclass(frozen=True, eq=False)
class Autoguidance:
    """D' = D_ref + weight (D - D_ref), written as the correction (weight - 1) (D - D_ref) of D.

    Attributes:
        reference: a smaller or less trained denoiser of the same data, with the same conditioning.
        weight: 1 guides nothing; EDM2's presets use 1.7 to 2.9.
    """

    reference: Denoiser
    weight: float | Tensor

    evaluations = 1
    gradients = 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.weight != 1)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        worse = self.reference(x, sigma, class_labels).to(denoised.dtype)
        return denoised - worse, (self.weight - 1) * torch.ones_like(sigma), None
