"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), optionally in an interval (arXiv 2404.07724)."""

import math
from dataclasses import dataclass

from torch import Tensor

from dgfast.guidance.compose import Denoiser


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuidance:
    """D' = D_u + scale (D_c - D_u), written as the correction (scale - 1) (D_c - D_u) of D_c.

    One convention: `scale` as in Imagen, diffusers and EDM2, where 1 is unguided. Ho and Salimans' w is scale - 1.

    Attributes:
        denoiser: the conditional denoiser; without labels it gives D_u.
        scale: 1 guides nothing.
        interval: (low, high], the noise levels sigma at which it acts, judged for each sample.
    """

    denoiser: Denoiser
    scale: float | Tensor
    interval: tuple[float, float] = (0.0, math.inf)

    evaluations = 1
    gradients = 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale != 1) and sigma_high > self.interval[0] and sigma_low <= self.interval[1]

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        unconditional = self.denoiser(x, sigma, None).to(denoised.dtype)
        inside = (self.interval[0] < sigma) & (sigma <= self.interval[1])
        return denoised - unconditional, (self.scale - 1) * inside.to(sigma.dtype), None
