"""What a bundle's own discriminator thinks of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance
from dgfast.networks import image_shape, load
from dgfast.training.classifier import to_vp

_SIGMAS = (0.05, 0.2, 0.5, 1.0, 2.0)  # at which it is asked


class LogRatio:
    """The gated log-ratio of images, a mean over noise levels; the noise is the same in every set of images."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self._name, self._device, self._networks = bundle.name, device, load(bundle, device)
        self._classes = self._networks.denoiser.label_dim
        # Of a bundle of latents the discriminator judges those, and there are images here.
        self.there = self._networks.discriminator is not None and not bundle.vae

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that it judges."""
        channels, height, width = image_shape(self._networks.denoiser)
        return height, width, channels

    def require_labels(self, name: str, labels: Tensor) -> None:
        """
        Raises:
            UserError: one of the labels is no class of the discriminator's.
        """
        wrong = labels[(labels < 0) | (labels >= self._classes)]
        if self._classes and len(wrong):
            label = f"a label {wrong[0]}" if wrong[0] >= 0 else "an image without label"
            raise UserError(
                f"{name}: there is {label}, and the discriminator of bundle {self._name} judges classes 0 to "
                f"{self._classes - 1}; give --metrics without log_ratio, or images with labels"
            )

    def __call__(self, images: Tensor, labels: Tensor, first: int) -> Tensor:
        """Of images uint8 [B, H, W, C] with labels [B], the first of which is the `first` of its set: float64 [B]."""
        assert self._networks.discriminator is not None
        guidance = DiscriminatorGuidance(self._networks.discriminator, time=self._networks.time)
        pixels = images.permute(0, 3, 1, 2).to(self._device).float() / 127.5 - 1
        rows = F.one_hot(labels, self._classes).float().to(self._device) if self._classes else None
        total = torch.zeros(len(images), dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(first)
            for level in _SIGMAS:
                sigma = torch.full((len(images),), level, dtype=torch.float64, device=self._device)
                total += guidance.log_ratio(to_vp(pixels, sigma), sigma, rows).double().cpu()
        return total / len(_SIGMAS)
