"""Classifiers: noise-aware for guidance (ADM, arXiv 2105.05233, section 4) and of clean images for the metrics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.training.data import ImageSet
from dgfast.vp import vp_alpha, vp_sigma, vp_time

# The feature network's training images move and get noise, so that its features see strokes rather than exact
# positions and the last grey levels.
_SHIFT = 2  # pixels
_NOISE = 0.25  # largest standard deviation, for pixels in [-1, 1]


def noisy_classifier_loss(data: ImageSet, device: torch.device) -> Callable[[nn.Module, int], Tensor]:
    """Cross-entropy of an ADM encoder on images noised to a uniform VP time tau, as ADM trains it."""
    images, labels = (tensor.to(device) for tensor in data.tensors())

    def loss(net: nn.Module, batch: int) -> Tensor:
        assert isinstance(net, EncoderUNetModel)
        picks = torch.randint(len(images), (batch,)).to(device)
        sigma = vp_sigma(torch.rand(batch, dtype=torch.float64).clamp(min=1e-5)).to(device)
        logits = NoisyClassifier(net)(to_vp(images[picks], sigma), vp_time(sigma))
        return F.cross_entropy(logits, labels[picks])

    return loss


def clean_classifier_loss(data: ImageSet, device: torch.device) -> Callable[[nn.Module, int], Tensor]:
    """Cross-entropy of a `FeatureNet` on images with a random shift and a little noise."""
    images, labels = (tensor.to(device) for tensor in data.tensors())
    size = images.shape[-1]
    padded = F.pad(images, (_SHIFT,) * 4, value=-1.0)

    def loss(net: nn.Module, batch: int) -> Tensor:
        picks = torch.randint(len(images), (batch,)).to(device)
        top, left = (int(torch.randint(2 * _SHIFT + 1, ())) for _ in range(2))
        shifted = padded[picks, :, top : top + size, left : left + size]
        noise = _NOISE * torch.rand(batch, 1, 1, 1) * torch.randn(shifted.shape)
        return F.cross_entropy(net(shifted + noise.to(device)), labels[picks])

    return loss


def to_vp(images: Tensor, sigma: Tensor) -> Tensor:
    """Noisy images at VP scale: alpha (x + sigma n) with fresh unit noise n; sigma [B], float64."""
    noisy = images + sigma.float().view(-1, 1, 1, 1) * torch.randn(images.shape).to(images.device)
    return vp_alpha(sigma).float().view(-1, 1, 1, 1) * noisy


@torch.no_grad()
def accuracy(net: nn.Module, data: ImageSet, device: torch.device) -> float:
    """Share of clean images that `net` (images -> logits) classifies rightly."""
    images, labels = (tensor.to(device) for tensor in data.tensors())
    return float((net(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def accuracy_by_sigma(
    net: NoisyClassifier, data: ImageSet, sigmas: tuple[float, ...], device: torch.device
) -> dict[str, float]:
    """Share of images with noise sigma that the noise-aware classifier gets right, at each level."""
    images, labels = (tensor.to(device) for tensor in data.tensors())
    torch.manual_seed(0)
    by_sigma = {}
    for level in sigmas:
        sigma = torch.full((len(images),), level, dtype=torch.float64, device=device)
        right = net(to_vp(images, sigma), vp_time(sigma)).argmax(1) == labels
        by_sigma[f"{level:g}"] = round(float(right.float().mean()), 4)
    return by_sigma
