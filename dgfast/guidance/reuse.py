"""Guidance reuse: compute the discriminator's gradient at every K-th guided call, carry it over to those between.

What is carried over is the unweighted correction of the score, g = grad_x log_ratio. It changes slowly along a
trajectory (Compress Guidance, arXiv 2408.11194, skips four calls in ten), while w sigma^2, which turns it into a
correction of the denoised image, is known exactly at every call.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dgfast.guidance.compose import Denoiser, GuidedDenoiser, corrected, guided_denoiser
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.discriminator import DiscriminatorGuidance
from dgfast.vp import vp_alpha

GradientKeepingDenoiser = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def gradient_keeping_denoiser(
    denoiser: Denoiser, others: Sequence[Guidance], discriminator: DiscriminatorGuidance, clip: bool = False
) -> GradientKeepingDenoiser:
    """As `guided_denoiser` with `others` and `discriminator`, and g [B, C, H, W], float32, as a third result."""
    return partial(_gradient_keeping, guided_denoiser(denoiser, others, clip), discriminator)


def _gradient_keeping(
    without: GuidedDenoiser, discriminator: DiscriminatorGuidance, x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    denoised, _ = without(x, sigma, class_labels)
    direction, gate, log_ratio = discriminator.correct(x, sigma, class_labels, denoised)
    gradient = vp_alpha(sigma).view(-1, 1, 1, 1) * direction  # ungated: the next call may be inside the window
    return corrected(denoised, direction, gate), log_ratio.to(sigma.dtype), gradient.float()


class CarriedGradient:
    """The gradients of the last calls that computed one, and what they say about the next call."""

    def __init__(self, reuse: str) -> None:
        """
        Args:
            reuse: "hold" takes the last gradient; "linear" continues the line through the last two in log sigma.
        """
        self._reuse = reuse
        self._known: list[tuple[Tensor, Tensor]] = []

    def keep(self, sigma: Tensor, gradient: Tensor) -> None:
        """Remember gradient [B, C, H, W] at the noise levels sigma [B]."""
        self._known = [*self._known[-1:], (sigma.view(-1, 1, 1, 1), gradient)]

    def correction(self, sigma: Tensor, weight: Tensor | float) -> Tensor:
        """What to add to the denoised images at the noise levels sigma [B] for this guidance weight, one or [B]."""
        sigma, weight = sigma.view(-1, 1, 1, 1), torch.as_tensor(weight).view(-1, 1, 1, 1)
        at, gradient = self._known[-1]
        if self._reuse == "linear" and len(self._known) == 2:
            before, earlier = self._known[0]
            share = torch.where(at != before, (sigma / at).log() / (at / before).log(), 0.0)
            gradient = gradient + share * (gradient - earlier)
        return weight * sigma**2 * gradient
