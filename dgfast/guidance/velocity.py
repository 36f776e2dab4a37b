"""The guided velocity: what the guided denoiser is to a solver in sigma, to one that steps along a path.

A path's state is finite where its noise level is infinite, at the beginning, and its velocity where nothing is left to
denoise, at the end. So guidances that mix predictions mix velocities here, which are linear in the denoised images. All
others correct denoised images, D' = D + gate direction, which is v' = v + gate direction dv/dD. They do nothing at
infinite noise, where an image shows nothing, nor where no noise is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.guidance.compose import Prediction, corrected, gradient_corrections, predicted, with_mixing
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import OUTSIDE_WINDOW

if TYPE_CHECKING:
    from dgfast.denoiser import FlowPrecond

AnyGuidance = TypeVar("AnyGuidance", bound=Guidance)
GuidedVelocity = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def of_velocities(guidance: AnyGuidance, net: FlowPrecond) -> AnyGuidance:
    """The guidance with velocities for its networks, if it mixes what they predict; any other as it is.

    Raises:
        UserError: none of its networks has a velocity, or one has it on another path than `net`'s.
    """
    if not guidance.mixes_velocities:
        return guidance
    parts: dict[str, Any] = {field.name: getattr(guidance, field.name) for field in fields(guidance)}  # type: ignore[arg-type]
    flows = {name: part for name, part in parts.items() if hasattr(part, "as_velocity")}
    if not flows or any(part.path_name != net.path_name for part in flows.values()):
        what = guidance.name or type(guidance).__name__
        raise UserError(f"{what} along a path needs a network of flow matching on the same path, {net.path_name}")
    return replace(guidance, **{name: part.as_velocity() for name, part in flows.items()})  # type: ignore[type-var]


def guided_velocity(net: FlowPrecond, guidances: Sequence[Guidance]) -> GuidedVelocity:
    """The function (x, sigma, class_labels) -> (velocity, log_ratio).

    x are states of the net's path [B, C, H, W] at the noise levels sigma [B], from infinity to 0. velocity has the type
    of x, and is finite at both ends as long as the net's is.

    Args:
        guidances: see `of_velocities`.
    """
    return partial(_guided_velocity, net, tuple(guidances))


def _guided_velocity(
    net: FlowPrecond, guidances: Sequence[Guidance], x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    of_predictions = [guidance for guidance in guidances if guidance.mixes_velocities]
    of_images = [guidance for guidance in guidances if not guidance.mixes_velocities]
    log_ratio = torch.full_like(sigma, OUTSIDE_WINDOW)
    if not of_images:
        plain = net.velocity(x, sigma, class_labels).to(x.dtype)
        return with_mixing(plain, of_predictions, x, sigma, class_labels), log_ratio

    path, inside = net.path, (sigma > 0) & (sigma < torch.inf)
    level = torch.where(inside, sigma, 1.0)  # any that is finite: what is computed of it is thrown away
    t = path.sigma_inv(level).view(-1, 1, 1, 1)
    rise = torch.where(inside, path.velocity_of_clean(t).flatten(), 0.0)
    image = (x / path.s(t)).to(x.dtype)  # with noise of that level
    velocities: list[Tensor] = []

    def predict(image: Tensor) -> Prediction:
        state = (path.s(t) * image).to(x.dtype)
        velocity = net.velocity(state, sigma, class_labels).to(x.dtype)
        velocities.append(velocity.detach())
        return path.clean(state, velocity, t), None

    (plain, _), through = predicted(predict, of_images, image, level, class_labels)
    velocity = with_mixing(velocities[0], of_predictions, x, sigma, class_labels)
    denoised = begun = path.clean(x, velocity, t).to(x.dtype)
    mixing = [guidance for guidance in of_images if not guidance.gradients and not guidance.backwards]
    if mixing:
        denoised = with_mixing(plain, mixing, image, level, class_labels, begun=begun)
        velocity = corrected(velocity, denoised - begun, rise)
    for direction, gate, ratio in (*through, *gradient_corrections(denoised, of_images, image, level, class_labels)):
        velocity = corrected(velocity, direction, gate * rise)
        if ratio is not None:
            log_ratio = torch.where(inside, ratio.to(log_ratio.dtype), log_ratio)
    return velocity, log_ratio
