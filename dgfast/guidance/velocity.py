"""The guided velocity: what the guided denoiser is to a solver in sigma, to one that steps along a path.

A path's state is finite where its noise level is infinite, at the beginning, and its velocity where nothing is left to
denoise, at the end. So guidances that mix denoisers mix velocities here, which are linear in the denoised images; and
a gradient guidance corrects D' = D + gate grad l, which is v' = v + gate grad l dv/dD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgfast.guidance.compose import corrected, gradient_corrections, with_mixing
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import OUTSIDE_WINDOW

if TYPE_CHECKING:
    from dgfast.denoiser import FlowPrecond

GuidedVelocity = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def guided_velocity(net: FlowPrecond, guidances: Sequence[Guidance]) -> GuidedVelocity:
    """The function (x, sigma, class_labels) -> (velocity, log_ratio).

    x are states of the net's path [B, C, H, W] at the noise levels sigma [B], from infinity to 0. velocity has the type
    of x. A gradient guidance does nothing at infinite noise, where an image shows nothing, nor at none. At both ends
    the velocity is finite as long as the net's is.

    Args:
        guidances: those that mix denoisers call a `denoiser.Velocity` for their network.
    """
    return partial(_guided_velocity, net, tuple(guidances))


def _guided_velocity(
    net: FlowPrecond, guidances: Sequence[Guidance], x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    plain = net.velocity(x, sigma, class_labels).to(x.dtype)
    velocity = with_mixing(plain, guidances, x, sigma, class_labels, clip=False)
    log_ratio = torch.full_like(sigma, OUTSIDE_WINDOW)
    if not any(guidance.gradients for guidance in guidances):
        return velocity, log_ratio
    inside = (sigma > 0) & (sigma < torch.inf)
    level = torch.where(inside, sigma, 1.0)  # any that is finite: what is computed of it is thrown away
    t = net.path.sigma_inv(level).view(-1, 1, 1, 1)
    denoised = net.path.clean(x, velocity, t).to(x.dtype)
    rise = net.path.velocity_of_clean(t).flatten()
    for direction, gate, ratio in gradient_corrections(
        denoised, guidances, (x / net.path.s(t)).to(x.dtype), level, class_labels
    ):  # fmt: skip
        velocity = corrected(velocity, direction, torch.where(inside, gate * rise, 0.0))
        if ratio is not None:
            log_ratio = torch.where(inside, ratio.to(log_ratio.dtype), log_ratio)
    return velocity, log_ratio
