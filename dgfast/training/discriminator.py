"""DG's discriminator (arXiv 2211.17091, algorithm 1): real against generated images at every noise level."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.discriminator import Discriminator
from dgfast.networks import ScoreNet
from dgfast.training.classifier import to_vp
from dgfast.training.data import ImageSet
from dgfast.vp import vp_alpha

Time = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """Real and generated images, noised and shown to a discriminator.

    Attributes:
        real, generated: images [N, C, H, W] with class indices [N], on the device.
        trunk: the frozen classifier under the head that is trained, or None: it reads the images.
        classes: of the discriminator; 0: it is not told. time: t(sigma) as guidance will call it.
        sigmas: lowest and largest noise level; ln sigma is uniform between them, which is what DG's importance-sampled
            time comes to (`noise_levels.log_uniform_sigma`).
    """

    real: tuple[Tensor, Tensor]
    generated: tuple[Tensor, Tensor]
    trunk: EncoderUNetModel | None
    classes: int
    time: Time
    sigmas: tuple[float, float]

    def cross_entropy(self, net: nn.Module, batch: int) -> Tensor:
        """Binary cross-entropy; half of each batch is real, of label 1, half generated."""
        picked = [_pick(images, batch // 2) for images in (self.real, self.generated)]
        images, labels = (torch.cat(parts) for parts in zip(*picked, strict=True))
        sigma = self._sigma(len(images))
        logit = self.logit(net, to_vp(images, sigma), sigma, labels)
        is_real = (torch.arange(len(images), device=logit.device) < batch // 2).float()
        return F.binary_cross_entropy_with_logits(logit, is_real)

    def corrected_denoising(self, score: ScoreNet) -> Callable[[nn.Module, int], Tensor]:
        """EDM's weighted error of the guided denoiser D + sigma^2 grad log_ratio on real images, weight 1.

        The guided model's own denoising score matching: weighted over sigma as likelihood is, it bounds the divergence
        KL(data | guided model) (arXiv 2101.09258, theorem 1), where cross-entropy bounds none once the discriminator
        overfits (arXiv 2503.16117, which trains by this gradient). Differentiates twice through the discriminator.
        """
        sd = getattr(score, "sigma_data", 0.5)

        def loss(net: nn.Module, batch: int) -> Tensor:
            x0, labels = _pick(self.real, batch)
            sigma = self._sigma(batch)
            error, correction = self.correction(net, score, x0, sigma, labels)
            weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
            return (weight.float().view(-1, 1, 1, 1) * (error + correction) ** 2).mean()

        return loss

    def correction(
        self, net: nn.Module, score: ScoreNet, x0: Tensor, sigma: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """On freshly noised x0, the denoiser's error D - x0 and what weight 1 adds to it: [B, C, H, W] each."""
        scale = sigma.float().view(-1, 1, 1, 1)
        x = x0 + scale * torch.randn(x0.shape).to(x0.device)
        rows = F.one_hot(labels, score.label_dim).float() if score.label_dim else None
        with torch.no_grad():
            denoised = score(x, sigma.to(x.dtype), rows)
        with torch.enable_grad(), _twice_differentiable():
            x = x.requires_grad_()
            logit = self.logit(net, vp_alpha(sigma).float().view(-1, 1, 1, 1) * x, sigma, labels)
            (gradient,) = torch.autograd.grad(logit.sum(), x, create_graph=net.training)
        return denoised - x0, scale**2 * gradient

    def logit(self, net: nn.Module, u: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(net, EncoderUNetModel)
        rows = F.one_hot(labels, self.classes) if self.classes else None
        return Discriminator(self.trunk, net)(u, self.time(sigma), rows)

    def _sigma(self, count: int) -> Tensor:
        low, high = (math.log(sigma) for sigma in self.sigmas)
        u = torch.rand(count, dtype=torch.float64)
        return (low + u * (high - low)).exp().to(self.real[0].device)


def _pick(images: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    picks = torch.randint(len(images[0]), (count,)).to(images[0].device)
    return images[0][picks], images[1][picks]


def _twice_differentiable() -> AbstractContextManager[None]:
    """The attention of torch that has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def on_device(data: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = data.tensors()
    return images.to(device), labels.to(device)


def judge_by_sigma(
    trial: Trial, net: nn.Module, score: ScoreNet, sigmas: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """What `net` makes of the trial's images, at each noise level.

    Returns:
        by level: accuracy and binary cross-entropy, real and generated images weighing the same; and denoising, the
        mean squared error of the denoiser under guidance of weight 1 on the real ones, over the unguided one's: below
        1, guidance brings it closer to the data.
    """
    torch.manual_seed(0)
    by_sigma = {}
    for level in sigmas:
        losses, rights = [], []
        for (images, labels), is_real in ((trial.real, 1.0), (trial.generated, 0.0)):
            sigma = torch.full((len(images),), level, dtype=torch.float64, device=images.device)
            with torch.no_grad():
                logit = trial.logit(net, to_vp(images, sigma), sigma, labels)
            target = torch.full_like(logit, is_real)
            losses.append(F.binary_cross_entropy_with_logits(logit, target))
            rights.append(((logit > 0).float() == target).float().mean())
        by_sigma[f"{level:g}"] = {
            "accuracy": round(float(torch.stack(rights).mean()), 4),
            "loss": round(float(torch.stack(losses).mean()), 4),
            "denoising": round(_share_of_error(trial, net, score, level), 4),
        }
    return by_sigma


def _share_of_error(trial: Trial, net: nn.Module, score: ScoreNet, level: float, batch: int = 100) -> float:
    guided, unguided = 0.0, 0.0
    for images, labels in zip(*(part.split(batch) for part in trial.real), strict=True):
        sigma = torch.full((len(images),), level, dtype=torch.float64, device=images.device)
        error, correction = trial.correction(net, score, images, sigma, labels)
        unguided += float(error.square().sum())
        guided += float((error + correction.detach()).square().sum())
    return guided / unguided


def told_apart_by_labels(real: np.ndarray, generated: np.ndarray, classes: int) -> str | None:
    """A sentence where labels int64 [N] alone, of which a discriminator is told, say what is generated."""
    if not classes:
        return None
    shares = [np.bincount(labels, minlength=classes) / len(labels) for labels in (real, generated)]
    # The largest part of it that is chance, as standard deviations of the shares.
    chance = np.sqrt(sum(shares) / 2 * (1 / len(real) + 1 / len(generated))).sum() / 2
    apart = float(abs(shares[0] - shares[1]).sum()) / 2
    if apart < _BY_LABELS + chance:
        return None
    missing = np.flatnonzero((shares[0] > 0) & (shares[1] == 0))
    which = f"; of class {', '.join(map(str, missing[:5]))} none is generated" if len(missing) else ""
    return (
        f"labels alone tell {0.5 + apart / 2:.0%} of real and generated images apart{which}: the discriminator will "
        "learn that. Draw classes as often as the data have them"
    )


def verdict(by_sigma: dict[str, dict[str, float]], divergence: bool = False) -> str | None:
    """A sentence where it is of no use: it sees nothing, or everything, or not what the denoiser gets wrong.

    Args:
        by_sigma: of `judge_by_sigma`. divergence: whether it was trained to correct the denoiser; its logit then tells
            nothing apart, as it is known up to a constant at each sigma.
    """
    blind = all(judged["loss"] > math.log(2) - _BLIND for judged in by_sigma.values())
    sharp = [level for level, judged in by_sigma.items() if judged["accuracy"] > _SHARP and float(level) >= _NOISY]
    share = sum(judged["denoising"] for judged in by_sigma.values()) / len(by_sigma)
    if blind and not divergence:
        return (
            "held-out real and generated images cannot be told apart at any noise level: this discriminator guides "
            "toward nothing. Draw more images, or train longer or with another --net"
        )
    if sharp and not divergence:
        return (
            f"real and generated images are told apart trivially (over {_SHARP:.0%} at sigma {', '.join(sharp)}): "
            "look whether they differ in more than the model's errors, such as size before scaling, format or class"
        )
    if share >= 1:
        return (
            f"on held-out real images, guidance of weight 1 does not bring the denoiser closer: its squared error is "
            f"{share:.4f} of the unguided one's, in the mean over noise levels. "
            + ("Train longer or on more images, or leave it out" if divergence else "Try --objective kl")
        )
    return None


_BLIND = 0.003  # nats below a guess's cross-entropy that still are chance in some thousand images
_SHARP, _NOISY = 0.99, 0.2
_BY_LABELS = 0.2  # total variation between the shares of classes
