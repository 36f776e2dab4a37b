"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), optionally in an interval (arXiv 2404.07724).

DiT-G++ (arXiv 2211.17091) uses two scales, a small one at high noise and a larger one below a branch; DiT
(arXiv 2212.09748) publishes its numbers with the first three of four latent channels guided.
"""

import math
from dataclasses import dataclass

import torch
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
        scale_low: scale at noise levels sigma of `branch` and below; None: the same as above it.
        channels: guide the first so many channels alone; None: all.
    """

    denoiser: Denoiser
    scale: float | Tensor
    interval: tuple[float, float] = (0.0, math.inf)
    scale_low: float | Tensor | None = None
    branch: float = 0.0
    channels: int | None = None

    evaluations = 1
    gradients = 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        low = self.scale if self.scale_low is None else self.scale_low
        above, below = sigma_high > self.branch, sigma_low <= self.branch
        guides = bool((above and self.scale != 1) or (below and low != 1))
        return guides and sigma_high > self.interval[0] and sigma_low <= self.interval[1]

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        unconditional = self.denoiser(x, sigma, None).to(denoised.dtype)
        direction = denoised - unconditional
        if self.channels is not None:
            direction = torch.cat([direction[:, : self.channels], torch.zeros_like(direction[:, self.channels :])], 1)
        inside = ((self.interval[0] < sigma) & (sigma <= self.interval[1])).to(sigma.dtype)
        return direction, (self._scale(sigma) - 1) * inside, None

    def _scale(self, sigma: Tensor) -> Tensor | float:
        return self.scale if self.scale_low is None else torch.where(sigma > self.branch, self.scale, self.scale_low)
