"""The guided denoiser: one pure function of a denoiser and its guidances."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dgfast import ops
from dgfast.guidance.gradient import OUTSIDE_WINDOW

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
GuidedDenoiser = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Guidance(Protocol):
    """One correction of the denoised image.

    Attributes:
        evaluations, gradients: forwards of a denoiser, and forwards with input gradient of another network, that one
            call costs on top of the denoiser's own forward.
    """

    @property
    def evaluations(self) -> int: ...

    @property
    def gradients(self) -> int: ...

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        """Whether it corrects anything at all between two noise levels; where not, it need not be called."""
        ...

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add gate x direction to `denoised`: direction [B, C, H, W] and gate [B]; and the log-ratio [B] if it has one.

        Arguments as for the function that `guided_denoiser` returns. Pure: no host synchronisation and no branch on
        the value of a tensor, so that it can be traced, compiled and exported.
        """
        ...


def guided_denoiser(denoiser: Denoiser, guidances: Sequence[Guidance]) -> GuidedDenoiser:
    """The function (x, sigma, class_labels) -> (denoised, log_ratio) that every runtime executes.

    x are noisy images [B, C, H, W] with noise of standard deviation sigma [B]; class_labels [B, label_dim] or None.
    denoised [B, C, H, W] has the type of x; log_ratio [B] is the discriminator's, or `OUTSIDE_WINDOW` without one.
    """

    def guided(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        plain = denoiser(x, sigma, class_labels).to(x.dtype)
        denoised = plain
        log_ratio = torch.full_like(sigma, OUTSIDE_WINDOW)
        for guidance in guidances:
            direction, gate, ratio = guidance.correct(x, sigma, class_labels, plain)
            denoised = ops.guide(denoised, direction, gate)
            log_ratio = log_ratio if ratio is None else ratio.to(log_ratio.dtype)
        return denoised, log_ratio

    return guided
