"""DG's discriminator (arXiv 2211.17091, algorithm 1): real against generated images at every noise level."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.discriminator import Discriminator
from dgfast.noise_levels import log_uniform_sigma
from dgfast.training.classifier import to_vp
from dgfast.training.data import ImageSet
from dgfast.vp import vp_time


def discriminator_loss(
    trunk: EncoderUNetModel, real: ImageSet, generated: ImageSet, classes: int, device: torch.device
) -> Callable[[nn.Module, int], Tensor]:
    """Binary cross-entropy of a discriminator's head; label 1 is real.

    Half of each batch is real, half generated. sigma is log-uniform, which is what DG's importance-sampled time comes
    to (`noise_levels.log_uniform_sigma`). The trunk is frozen.
    """
    sets = [tuple(tensor.to(device) for tensor in data.tensors()) for data in (real, generated)]

    def loss(net: nn.Module, batch: int) -> Tensor:
        assert isinstance(net, EncoderUNetModel)
        picked = [
            (images[picks], labels[picks])
            for images, labels in sets
            for picks in [torch.randint(len(images), (batch // 2,)).to(device)]
        ]
        images, labels = (torch.cat(parts) for parts in zip(*picked, strict=True))
        sigma = log_uniform_sigma(torch.rand(len(images))).to(device)
        logit = Discriminator(trunk, net)(to_vp(images, sigma), vp_time(sigma), F.one_hot(labels, classes))
        is_real = (torch.arange(len(images), device=device) < batch // 2).float()
        return F.binary_cross_entropy_with_logits(logit, is_real)

    return loss


@torch.no_grad()
def judge_by_sigma(
    net: Discriminator,
    real: ImageSet,
    generated: ImageSet,
    classes: int,
    sigmas: tuple[float, ...],
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Held-out accuracy and binary cross-entropy at each noise level, both halves weighing the same."""
    torch.manual_seed(0)
    by_sigma = {}
    for level in sigmas:
        losses, rights = [], []
        for data, is_real in ((real, 1.0), (generated, 0.0)):
            images, labels = (tensor.to(device) for tensor in data.tensors())
            sigma = torch.full((len(images),), level, dtype=torch.float64, device=device)
            logit = net(to_vp(images, sigma), vp_time(sigma), F.one_hot(labels, classes))
            target = torch.full_like(logit, is_real)
            losses.append(F.binary_cross_entropy_with_logits(logit, target))
            rights.append(((logit > 0).float() == target).float().mean())
        by_sigma[f"{level:g}"] = {
            "accuracy": round(float(torch.stack(rights).mean()), 4),
            "loss": round(float(torch.stack(losses).mean()), 4),
        }
    return by_sigma
