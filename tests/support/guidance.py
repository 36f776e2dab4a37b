"""Gaussian data, of which denoisers, discriminator and classifier are known in closed form, for guidances to act on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.guidance import Guidance

NO_WINDOW = (0.0, 2.0)  # every noise level in use
MEANS, VARIANCE = (-0.5, 0.7), 0.1  # of the two classes


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


@dataclass
class Gaussian:
    """The perfect denoiser of independent pixels with this mean and variance, whatever the labels say."""

    mean: float
    variance: float
    label_dim: int = 0
    img_channels: int = 1
    img_resolution: int = 1
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        noise = column(sigma) ** 2
        return (self.variance * x + noise * self.mean) / (self.variance + noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def log_density(self, u: Tensor, sigma: Tensor) -> Tensor:
        """log p(u) of noisy images at the unit scale of the VP process, pixels summed: [B]."""
        alpha = column(nl.vp_alpha(sigma))
        variance = alpha**2 * (self.variance + column(sigma) ** 2)
        return -0.5 * ((u.double() - alpha * self.mean) ** 2 / variance + variance.log()).sum(dim=(1, 2, 3))


DATA, MODEL = Gaussian(mean=0.3, variance=0.25), Gaussian(mean=0.0, variance=0.36)
CLASSES = tuple(Gaussian(mean, VARIANCE) for mean in MEANS)


class Exact(nn.Module):
    """A closed form as the score network of a sampler."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 1, 2, 0.0, math.inf

    def __init__(self, denoiser: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.denoiser(x, sigma, None)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


def exact_discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The log-ratio of DATA to MODEL: what a perfect discriminator of the two would answer."""
    sigma = nl.vp_sigma(t)
    return DATA.log_density(u, sigma) - MODEL.log_density(u, sigma)


def exact_classifier(u: Tensor, t: Tensor) -> Tensor:
    """Logits of the two classes, which are equally frequent: Bayes' rule."""
    sigma = nl.vp_sigma(t)
    return torch.stack([source.log_density(u, sigma) for source in CLASSES], dim=1)


def probability(u: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """p(class 1 | u) [B], written down anew: the logistic function of one straight line."""
    low, high = MEANS
    middle = (u - column(alpha) * (low + high) / 2).sum(dim=(1, 2, 3))
    return torch.sigmoid((high - low) * middle / (alpha * (VARIANCE + sigma**2)))


def mixture(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    """The perfect denoiser of both classes together."""
    alpha = nl.vp_alpha(sigma)
    high = column(probability(column(alpha) * x, sigma, alpha))
    return (1 - high) * CLASSES[0](x, sigma, None) + high * CLASSES[1](x, sigma, None)


def batch(seed: int, size: int = 6, pixels: int = 2) -> tuple[Tensor, Tensor]:
    """x [B, 1, pixels, pixels] and sigma [B], one noise level a sample, drawn as data would be."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-2, 1.9, size, dtype=torch.float64)
    noise = torch.randn(size, 1, pixels, pixels, dtype=torch.float64, generator=generator)
    return 0.2 + (0.3 + column(sigma) ** 2).sqrt() * noise, sigma


def rows(label: int, count: int) -> Tensor:
    """The class labels of a batch of one of the two classes, one-hot."""
    return F.one_hot(torch.full((count,), label), 2).float()


def correction_of(guidance: Guidance, *arguments: Any) -> tuple[Tensor, Any]:
    """What the guidance adds to the denoised images, and its log-ratio, None if it has none."""
    direction, gate, log_ratio = guidance.correct(*arguments)
    return column(gate) * direction, log_ratio


def reference_norm(gradient: Tensor, how: str) -> Tensor:
    g = gradient.double()
    length = {
        "none": torch.ones(1, dtype=torch.float64),
        "sample_l2": (g**2).sum(dim=(1, 2, 3), keepdim=True).sqrt(),
        "channel_l2": (g**2).sum(dim=1, keepdim=True).sqrt(),
        "max_abs": g.abs().amax(dim=(1, 2, 3), keepdim=True),
    }[how]
    return torch.where(length > 0, g / length, 0.0)


def unwanted(*arguments: object) -> Tensor:
    raise AssertionError("a network that guides nothing was called")
