"""Score Mismatching (arXiv 2309.11043): a generator trained through the input gradient of a score network.

The score network S learns to match the noise of real images and to mismatch that of generated ones; the generator G
learns to make images whose noise S predicts. Images are noised as x_t = x + sigma_t e, without scaling the signal.

For a fixed G the independent draw e' averages to 0, so S tends to r(x_t) E[e | x_t, real] with
r = p_real,t / (p_real,t + p_fake,t): a score times the probability that a discriminator would give to "real".

All losses are sums over pixels and means over the batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.noise_predictor import GROUP
from dgfast.outputs import save_grid, to_uint8
from dgfast.randomness import SeedStreams
from dgfast.training.loop import Player

LEVELS = 10
_REPEATS = 2  # noisings of one generated image in the generator's loss
_PENALTY_EVERY = 16
_BETA_FIRST, _BETA_LAST = 1e-4, 0.02
# A score network that knows nothing yet rates flat black images best, and a generator as fast as it gets stuck there.
_GENERATOR_RATE, _HEAD_START = 0.3, 300
_BETAS = (0.0, 0.99)  # Adam's; an adversarial game gets on badly with momentum


def noise_levels(levels: int = LEVELS) -> Tensor:
    """sigma_t = sqrt(1 - prod_{i <= t} (1 - beta_i)), beta linear from 1e-4 to 0.02: float64 [levels]."""
    beta = torch.linspace(_BETA_FIRST, _BETA_LAST, levels, dtype=torch.float64)
    return (1 - (1 - beta).cumprod(0)).sqrt()


@dataclass(frozen=True)
class Batch:
    """Noised images x [B, C, H, W], the unit noise in them, level indices [B] and class rows [B, label_dim] or None."""

    x: Tensor
    noise: Tensor
    level: Tensor
    class_labels: Tensor | None

    def error(self, score: nn.Module, target: Tensor) -> Tensor:
        """|| S(x, t, y) - target ||^2, mean over the batch."""
        return (score(self.x, self.level, self.class_labels) - target).square().flatten(1).sum(1).mean()


class Game:
    """The losses of both players; each reads the other as it is at that moment.

    Args:
        real: images [N, C, H, W] and their class indices [N].
        generator: (latents [B, latent_dim], class_labels) -> images; it says its `latent_dim` and `label_dim`.
        score: (x, level, class_labels) -> predicted noise.
    """

    def __init__(
        self, real: tuple[Tensor, Tensor], generator: nn.Module, score: nn.Module, device: torch.device
    ) -> None:
        labels = real[1].clamp(min=0)  # images without any are of one class
        order = labels.argsort(stable=True)
        self._images, self._labels = (tensor[order].to(device) for tensor in (real[0], labels))
        self._counts = self._labels.bincount()
        self._starts = self._counts.cumsum(0) - self._counts
        self._generator: Any = generator  # torch types no attributes of a module
        self._score, self._device = score, device
        self._sigmas = noise_levels().float().to(device)

    def score_loss(self, score: nn.Module, batch: int) -> Tensor:
        """|| S(x_real + sigma e) - e ||^2 + || S(G(z) + sigma e) - e' ||^2, e' independent of e."""
        real = self._noised(*self._real(batch))
        with torch.no_grad():
            fake = self._noised(*self._fake(batch))
        return real.error(score, real.noise) + fake.error(score, self._normal(fake.x.shape))

    def penalty(self, score: nn.Module, batch: int) -> Tensor:
        """R1: half the squared gradient of the sum of S over its outputs, at noised real images."""
        real = self._noised(*self._real(batch))
        x = real.x.requires_grad_()
        (gradient,) = torch.autograd.grad(score(x, real.level, real.class_labels).sum(), x, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean() / 2

    def generator_loss(self, generator: nn.Module, batch: int) -> Tensor:
        """Half of || S(G(z) + sigma e) - e ||^2, summed over two independent noisings of each image."""
        images, labels = self._fake(batch)
        noised = [self._noised(images, labels) for _ in range(_REPEATS)]
        return sum((each.error(self._score, each.noise) for each in noised), images.new_zeros(())) / _REPEATS

    def players(self, r1: float) -> list[Player]:
        """The score network, with R1 of weight `r1` now and then, and the generator."""

        def penalty(score: nn.Module, batch: int) -> Tensor:
            return r1 * self.penalty(score, batch)

        return [
            Player(self._score, self.score_loss, _BETAS, penalty=penalty, penalty_every=_PENALTY_EVERY),
            Player(self._generator, self.generator_loss, _BETAS, _GENERATOR_RATE, _HEAD_START),
        ]

    def _real(self, batch: int) -> tuple[Tensor, Tensor | None]:
        labels = self._classes(batch)
        picks = self._starts[labels] + (torch.rand(batch).to(self._device) * self._counts[labels]).long()
        return self._images[picks], self._rows(labels)

    def _fake(self, batch: int) -> tuple[Tensor, Tensor | None]:
        labels = self._rows(self._classes(batch))
        return self._generator(self._normal((batch, self._generator.latent_dim)), labels), labels

    def _classes(self, batch: int) -> Tensor:
        """Class indices [batch], as frequent as in the data; of conditional networks, in groups of one class."""
        group = GROUP if self._generator.label_dim else 1
        picks = torch.randint(len(self._labels), (-(-batch // group),)).to(self._device)
        return self._labels[picks].repeat_interleave(group)[:batch]

    def _rows(self, labels: Tensor) -> Tensor | None:
        classes = self._generator.label_dim
        return F.one_hot(labels, classes).float() if classes else None

    def _noised(self, images: Tensor, class_labels: Tensor | None) -> Batch:
        level = torch.randint(len(self._sigmas), (len(images),)).to(self._device)
        noise = self._normal(images.shape)
        return Batch(images + self._sigmas[level].view(-1, 1, 1, 1) * noise, noise, level, class_labels)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape).to(self._device)


@torch.no_grad()
def write_sheet(generator: nn.Module, path: Path, images: int = 100) -> None:
    """A grid of the same latents and classes each time, to see how the generator gets on: losses do not tell."""
    net: Any = generator  # torch types no attributes of a module
    device = next(generator.parameters()).device
    latents = SeedStreams(range(images)).normal((net.latent_dim,), torch.float32, device)
    classes = net.label_dim
    rows = F.one_hot(torch.arange(images, device=device) % classes, classes).float() if classes else None
    save_grid(to_uint8(generator(latents, rows)), path)
