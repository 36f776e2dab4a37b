"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), optionally in an interval (arXiv 2404.07724).

DiT-G++ (arXiv 2211.17091) uses two scales, a small one at high noise and a larger one below a branch; DiT
(arXiv 2212.09748) publishes its numbers with the first three of four latent channels guided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.options import option
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class ClassifierFreeGuidance(UnconditionalGuidance):
    """D' = D_u + scale (D_c - D_u), written as the correction (scale - 1) (D_c - D_u) of D_c.

    One convention: `scale` as in Imagen, diffusers and EDM2, where 1 is unguided. Ho and Salimans' w is scale - 1.

    Attributes:
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
            None, "Guide the first so many channels alone; 3 is DiT's published way.", "C", least=1, of_network=True
        )
        guidance_interval: tuple[float, float] = interval_option()

    scale_low: float | Tensor | None = None
    branch: float = 0.0
    channels: int | None = None

    name = "classifier-free guidance"
    formula = "D_u + s (D - D_u)"
    use = "the same, without a classifier"
    mixes_velocities = True

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        super().check(config)
        if (config.cfg_scale_low is None) != (config.cfg_branch == 0):
            raise UserError("cfg_scale_low and cfg_branch belong together: give both, or neither")
        if config.cfg_branch < 0:
            raise UserError(f"cfg_branch {config.cfg_branch} must be at least 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> ClassifierFreeGuidance:
        denoiser, channels = cls.conditional(networks), config.cfg_channels
        if channels is not None and channels > networks.denoiser.img_channels:
            raise UserError(f"--cfg-channels {channels}: this network's images have {networks.denoiser.img_channels}")
        return cls(
            denoiser, config.cfg_scale, config.guidance_interval, config.cfg_scale_low, config.cfg_branch, channels
        )

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        low = self.scale if self.scale_low is None else self.scale_low
        above, below = sigma_high > self.branch, sigma_low <= self.branch
        guides = bool((above and self.scale != 1) or (below and low != 1))
        return guides and self.reaches(sigma_low, sigma_high)

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        direction = denoised - unconditional
        if self.channels is not None:
            direction = torch.cat([direction[:, : self.channels], torch.zeros_like(direction[:, self.channels :])], 1)
        scale = self.scale
        if self.scale_low is not None:
            scale = torch.where(sigma > self.branch, self.scale, self.scale_low)
        return direction, (scale - 1) * torch.ones_like(sigma)
