"""What the gradient guidances share: the VP coordinates in which noise-aware networks read, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dgfast.guidance.options import option
from dgfast.vp import vp_alpha

if TYPE_CHECKING:
    from torch import Tensor

NORMALIZATIONS = ("none", "sample_l2", "channel_l2", "max_abs")
OUTSIDE_WINDOW = 1e7
"""The log-ratio that stands for "not judged", as in DG's code; large and positive, so it never triggers boosting."""


def normalize_option() -> str:
    """The option of the guidances that `normalized` is for; those that have it share it."""
    return option("none", "What is done to the gradients' lengths.", choices=NORMALIZATIONS)


def denoiser_gate(sigma: Tensor) -> Tensor:
    """sigma^2 alpha: what makes a correction of the denoised image of grad_u l, at weight 1."""
    return sigma**2 * vp_alpha(sigma)


def log_density_gradient(
    log_density: Callable[[Tensor], Tensor], x: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_u l(u) at u = alpha x, its `denoiser_gate`, and l(u) itself.

    Args:
        log_density: u [B, C, H, W], float32 -> l(u) [B], one value a sample that depends on that sample alone.
        x: noisy images [B, C, H, W]; sigma: their noise levels [B].

    Returns:
        gradient [B, C, H, W] in float32, gate [B] and l [B]. The gradient is taken for the input alone: the networks
        inside `log_density` must be frozen.
    """
    alpha = vp_alpha(sigma)
    gradient, value = input_gradient(log_density, alpha.view(-1, 1, 1, 1) * x)
    return gradient, denoiser_gate(sigma), value


def input_gradient(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """grad_u l(u) [B, C, H, W] in float32, and l [B]. What made u is left out: the gradient ends there."""
    import torch

    u = u.float().detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
    return gradient, value.detach()


def normalized(gradient: Tensor, how: str) -> Tensor:
    """The gradient [B, C, H, W] with its length taken away; one that is zero stays zero.

    Args:
        how: "none" leaves it alone; "sample_l2" divides each sample by its norm over all pixels and channels;
            "channel_l2" divides each pixel by its norm over the channels (torch's `F.normalize` without further
            arguments; with one channel it leaves the sign); "max_abs" divides each sample by its largest absolute
            value.
    """
    from torch.nn import functional as F

    if how == "none":
        return gradient
    if how == "channel_l2":
        return F.normalize(gradient, dim=1)
    order = math.inf if how == "max_abs" else 2.0
    return F.normalize(gradient.flatten(1), p=order, dim=1).view_as(gradient)
