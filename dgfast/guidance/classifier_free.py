"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), optionally in an interval (arXiv 2404.07724).

DiT-G++ (arXiv 2211.17091) uses two scales, a small one at high noise and a larger one below a branch; DiT
(arXiv 2212.09748) publishes its numbers with the first three of four latent channels guided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance, option
from dgfast.guidance.schedule import lower_bound

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.compose import Denoiser
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuidance(Guidance):
    """D' = D_u + scale (D_c - D_u), written as the correction (scale - 1) (D_c - D_u) of D_c.

    One convention: `scale` as in Imagen, diffusers and EDM2, where 1 is unguided. Ho and Salimans' w is scale - 1.

    Attributes:
        denoiser: the conditional denoiser; without labels it gives D_u.
        scale: 1 guides nothing.
        interval: (low, high], the noise levels sigma at which it acts, judged for each sample; a low of 0 is no bound.
        scale_low: scale at noise levels sigma of `branch` and below; None: the same as above it.
        channels: guide the first so many channels alone; None: all.
    """

    @dataclass(frozen=True)
    class Options:
        cfg_scale: float = option(1.0, "Scale; 1 turns it off. Ho and Salimans' w is s - 1.", "s", attribute="scale")
        cfg_scale_low: float | None = option(
            None, "The same at noise levels of --cfg-branch and below.", "s", attribute="scale_low", off=1.0
        )
        cfg_branch: float = option(0.0, "Noise level at which the one scale takes over.", "sigma")
        cfg_channels: int | None = option(
            None, "Guide the first so many channels alone; 3 is DiT's published way.", "C", least=1
        )
        guidance_interval: tuple[float, float] = option(
            (0.0, math.inf), "Noise levels between which --cfg-scale acts.", "sigma,sigma"
        )

    denoiser: Denoiser
    scale: float | Tensor
    interval: tuple[float, float] = (0.0, math.inf)
    scale_low: float | Tensor | None = None
    branch: float = 0.0
    channels: int | None = None

    name = "classifier-free guidance"
    formula = "D_u + s (D - D_u)"
    cost = "1 forward of the score net in the interval"
    use = "the same, without a classifier"
    evaluations, mixes_velocities = 1, True

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if (config.cfg_scale_low is None) != (config.cfg_branch == 0):
            raise UserError("cfg_scale_low and cfg_branch belong together: give both, or neither")
        if config.cfg_branch < 0:
            raise UserError(f"cfg_branch {config.cfg_branch} must be at least 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> ClassifierFreeGuidance:
        net, channels = networks.denoiser, config.cfg_channels
        if not net.label_dim:
            raise UserError(f"{cls.name} needs a conditional score network")
        if getattr(net, "null_class", 0) is None:
            raise UserError(
                f"{cls.name} needs a score network that was trained without labels too; an unconditional network "
                "as reference guides by --autoguidance"
            )
        if channels is not None and channels > net.img_channels:
            raise UserError(f"--cfg-channels {channels}: this network's images have {net.img_channels}")
        return cls(net, config.cfg_scale, config.guidance_interval, config.cfg_scale_low, config.cfg_branch, channels)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        low = self.scale if self.scale_low is None else self.scale_low
        above, below = sigma_high > self.branch, sigma_low <= self.branch
        guides = bool((above and self.scale != 1) or (below and low != 1))
        return guides and sigma_high > lower_bound(self.interval) and sigma_low <= self.interval[1]

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        import torch

        unconditional = self.denoiser(x, sigma, None).to(denoised.dtype)
        direction = denoised - unconditional
        if self.channels is not None:
            direction = torch.cat([direction[:, : self.channels], torch.zeros_like(direction[:, self.channels :])], 1)
        inside = ((lower_bound(self.interval) < sigma) & (sigma <= self.interval[1])).to(sigma.dtype)
        scale = self.scale
        if self.scale_low is not None:
            scale = torch.where(sigma > self.branch, self.scale, self.scale_low)
        return direction, (scale - 1) * inside, None
