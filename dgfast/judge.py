"""Sets of images against held-out ones, in the features of a bundle's own small classifier."""

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance
from dgfast.nets.features import FeatureNet
from dgfast.networks import image_shape, load
from dgfast.training.classifier import to_vp
from dgfast.training.data import ImageSet

_NEAREST_K = 5  # prdc's recommendation
FEWEST = _NEAREST_K + 2
"""So many images have so many neighbours each, and one more."""
_SIGMAS = (0.05, 0.2, 0.5, 1.0, 2.0)  # at which the discriminator is asked
_CHUNK = 250  # images a network call

Done = Callable[[int], object]
"""Told how many more images went through a network."""


class Judge:
    """The metrics of one image set against the held-out images."""

    def __init__(self, bundle: Bundle, held_out: ImageSet, device: torch.device) -> None:
        """
        Raises:
            UserError: the bundle has no network for features.
        """
        self._bundle, self._held_out, self._device = bundle, held_out, device
        features = bundle.load("features", device)
        if not isinstance(features, FeatureNet):
            raise UserError(f"bundle {bundle.name}: a {type(features).__name__} has no features to compare images in")
        self._net, self._networks = features, load(bundle, device)

    def require_fit(self, name: str, images: ImageSet) -> None:
        """
        Args:
            name: of the images, for the message.

        Raises:
            UserError: too few images, or such as the bundle's networks do not read.
        """
        if len(images) < FEWEST:
            raise UserError(f"{name}: {len(images)} images; {FEWEST} at least can be compared, better some thousands")
        _, height, width, channels = images.images.shape
        sides = self._held_out.images.shape[1:3] if self._bundle.vae else image_shape(self._networks.denoiser)[1:]
        if (channels, height, width) != (self._net.in_channels, *sides):
            raise UserError(
                f"{name}: these are {channels} x {height} x {width} images, and the networks of bundle "
                f"{self._bundle.name} judge {' x '.join(map(str, (self._net.in_channels, *sides)))}"
            )
        classes = self._networks.denoiser.label_dim
        if self._networks.discriminator is not None and classes:
            wrong = images.labels[(images.labels < 0) | (images.labels >= classes)]
            if len(wrong):
                raise UserError(
                    f"{name}: there is a label {wrong[0]}, and the discriminator of bundle {self._bundle.name} judges "
                    f"classes 0 to {classes - 1}"
                )

    def work(self, images: ImageSet) -> int:
        """How many images go through a network for this set."""
        levels = 0 if self._networks.discriminator is None else len(_SIGMAS)
        return (3 + levels) * len(images) + 2 * len(self._held_out)

    def __call__(self, images: ImageSet, done: Done = lambda count: None) -> dict[str, float]:
        """The metrics by name."""
        from prdc import compute_prdc

        drawn = self._features(images, done)
        with redirect_stdout(io.StringIO()):  # prdc prints its arguments
            scores = compute_prdc(self._real.numpy(), drawn.numpy(), nearest_k=_NEAREST_K)
        metrics = {"images": len(images), **self._distances(images, done), **{k: float(v) for k, v in scores.items()}}
        if self._networks.discriminator is not None:
            metrics["log_ratio"] = self._mean_log_ratio(images, done)
        return metrics

    @cached_property
    def _real(self) -> Tensor:
        return self._features(self._held_out, lambda count: None)

    def _features(self, images: ImageSet, done: Done) -> Tensor:
        parts = []
        with torch.no_grad():
            for chunk in images.tensors()[0].split(_CHUNK):
                parts.append(self._net.features(chunk.to(self._device)).cpu())
                done(len(chunk))
        return torch.cat(parts)

    def _distances(self, images: ImageSet, done: Done) -> dict[str, float]:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        torch.manual_seed(0)  # the kernel distance draws subsets
        extractor = _feature_module(self._net)
        subset = min(500, len(images) // 2, len(self._held_out) // 2)
        frechet = FrechetInceptionDistance(feature=extractor).to(self._device)
        with warnings.catch_warnings():  # that it keeps all features: a few thousand small ones
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
            kernel = KernelInceptionDistance(feature=extractor, subset_size=subset).to(self._device)
        for data, real in ((self._held_out, True), (images, False)):
            for chunk in data.tensors()[0].split(_CHUNK):
                frechet.update(chunk.to(self._device), real=real)
                kernel.update(chunk.to(self._device), real=real)
                done(2 * len(chunk))
        return {"frechet": float(frechet.compute()), "kernel": float(kernel.compute()[0])}

    def _mean_log_ratio(self, images: ImageSet, done: Done) -> float:
        """Mean of the gated log-ratio over images and over noise levels."""
        assert self._networks.discriminator is not None
        guidance = DiscriminatorGuidance(self._networks.discriminator, time=self._networks.time)
        pixels, labels = images.tensors()
        classes = self._networks.denoiser.label_dim
        torch.manual_seed(0)
        total = 0.0
        with torch.no_grad():
            for level in _SIGMAS:
                for x, y in zip(pixels.split(_CHUNK), labels.split(_CHUNK), strict=True):
                    sigma = torch.full((len(x),), level, dtype=torch.float64, device=self._device)
                    rows = F.one_hot(y, classes).float().to(self._device) if classes else None
                    total += float(guidance.log_ratio(to_vp(x.to(self._device), sigma), sigma, rows).sum())
                    done(len(x))
        return total / len(pixels) / len(_SIGMAS)


def _feature_module(net: FeatureNet) -> nn.Module:
    """`net` as torchmetrics wants it: images in, features out, their number as `num_features`."""

    class Features(nn.Module):
        num_features = net.num_features

        def forward(self, images: Tensor) -> Tensor:
            return net.features(images)

    return Features().eval()
