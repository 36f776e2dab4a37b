"""The frozen networks that a sampler works with, your own or a bundle's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import bundle as bundles
from dgfast.config import GuidanceConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.errors import UserError
from dgfast.guidance.declaration import guiding
from dgfast.nets import discriminator as noise_aware
from dgfast.nets.adm import EncoderUNetModel
from dgfast.vp import TIME_SCHEDULES, adm_time_schedule, vp_time

if TYPE_CHECKING:
    from dgfast.guidance.classifier import NoisyClassifier
    from dgfast.guidance.compose import Denoiser
    from dgfast.guidance.discriminator import Discriminator


class ScoreNet(Protocol):
    """What a sampler asks of a denoiser; the preconditioners of `dgfast.denoiser` provide it.

    Called with x [B, C, H, W], sigma [B] and class_labels [B, label_dim] or None, it returns the denoised images.

    Attributes:
        img_channels, img_resolution: shape of its images; (height, width) where they are not square.
        label_dim: number of its classes, 0 if unconditional.
        sigma_min, sigma_max: noise levels that it knows.
        conditions: if it has any, its extra conditions, see `dgfast.conditions`.
        draws_every_step: if it has it, and it is False: see `Sampler.integrate`, noise.
    """

    img_channels: int
    label_dim: int
    sigma_min: float
    sigma_max: float

    @property
    def img_resolution(self) -> int | tuple[int, int]: ...

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, /) -> Tensor: ...

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that it knows."""
        ...


def image_shape(net: ScoreNet) -> tuple[int, int, int]:
    """Channels, height and width of the images that it denoises."""
    side = net.img_resolution
    return (net.img_channels, *side) if isinstance(side, tuple | list) else (net.img_channels, side, side)


@dataclass(frozen=True, repr=False)
class Networks:
    """The frozen networks of a sampler; only `denoiser` must be there.

    Attributes:
        denoiser: see `ScoreNet`.
        discriminator: (u [B, C, H, W] at VP scale, t [B] in [0, 1], class_labels or None) -> logit of "real" [B].
        classifier: (u, t) -> logits [B, label_dim].
        reference: a worse denoiser, for autoguidance.
        time: t(sigma) as the classifier and the discriminator read it.
    """

    denoiser: ScoreNet
    discriminator: Discriminator | None = None
    classifier: NoisyClassifier | None = None
    reference: Denoiser | None = None
    time: Callable[[Tensor], Tensor] = vp_time

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: what is given for the denoiser is none, see `ScoreNet`.
        """
        _require_denoiser(self.denoiser)

    def __repr__(self) -> str:
        """Two lines: the denoiser, and the networks beside it."""
        net = self.denoiser
        classes = f"{net.label_dim} classes" if net.label_dim else "unconditional"
        shape = " x ".join(map(str, image_shape(net)))
        beside = {name: getattr(self, name) for name in ("discriminator", "classifier", "reference")}
        others = [f"{name} {described(net)}" for name, net in beside.items() if net is not None]
        return f"Networks: {described(net)}, images {shape}, {classes}\n  beside it: {', '.join(others) or 'none'}"


def _require_denoiser(net: ScoreNet) -> None:
    if not callable(net):
        raise UserError(f"the denoiser {net!r:.40} is no network: give a function (x, sigma, class_labels) -> images")
    kind, needed = f"denoiser {type(net).__name__}", ("img_channels", "img_resolution", "label_dim", "sigma_min")
    if missing := [name for name in (*needed, "sigma_max", "round_sigma") if not hasattr(net, name)]:
        raise UserError(f"{kind} has no {', '.join(missing)}: give it what `dgfast.networks.ScoreNet` says")
    shape, side, classes = image_shape(net), net.img_resolution, net.label_dim
    if len(shape) != 3 or not all(isinstance(size, SupportsIndex) and int(size) > 0 for size in shape):
        raise UserError(
            f"{kind}: img_channels {net.img_channels!r:.40} and img_resolution {side!r:.40} are no shape of an image, "
            "such as 3 and 64, or 3 and (48, 64)"
        )
    if not isinstance(classes, SupportsIndex) or int(classes) < 0:
        raise UserError(f"{kind}: label_dim {classes!r:.40} is no number of classes; without any it is 0")
    try:
        known = 0 <= float(net.sigma_min) < float(net.sigma_max)
    except (TypeError, ValueError):
        known = False
    if not known:
        levels = f"sigma_min {net.sigma_min!r:.40} must be at least 0, and below sigma_max {net.sigma_max!r:.40}"
        raise UserError(f"{kind}: {levels}")


def described(net: object) -> str:
    """The kind of a network and its size; of one inside a preconditioner, both kinds."""
    inner = getattr(net, "model", None)
    kind = type(net).__name__ + (f" of {type(inner).__name__}" if isinstance(inner, nn.Module) else "")
    if not isinstance(net, nn.Module):
        return kind
    return f"{kind} ({sum(parameter.numel() for parameter in net.parameters()):,} weights)"


def load(
    bundle: str | Path | bundles.Bundle = bundles.DEFAULT,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    guidance: GuidanceConfig | None = None,
) -> Networks:
    """The networks of a bundle, frozen and in eval mode.

    Args:
        bundle: a folder, the name of a bundle that comes with dgfast, or one that `bundle.read` returned.
        dtype: type of the weights; normalisation statistics and preconditioning stay float32.
        guidance: load only what these weights need; None loads whatever the bundle has.

    Raises:
        UserError: unknown or broken bundle, a network that `guidance` needs and the bundle lacks.
    """
    opened = bundle if isinstance(bundle, bundles.Bundle) else bundles.read(bundle)
    needed = roles(opened, guidance)
    nets: dict[str, Any] = {role: opened.load(role, device, dtype) for role in needed}
    trunk, head = nets.get("classifier"), nets.get("discriminator")
    if trunk is not None and not isinstance(trunk, EncoderUNetModel):
        raise UserError(
            f"bundle {opened.name}: its classifier, a {type(trunk).__name__}, reads no noise level; guidance needs a "
            "noise-aware one, such as `dgfast train classifier` makes"
        )
    score = nets["score"]
    if trunk is not None:
        read, made = (trunk.in_channels, trunk.image_size, trunk.image_size), image_shape(score)
        if read != made:
            shapes = [" x ".join(map(str, shape)) for shape in (read, made)]
            raise UserError(
                f"bundle {opened.name}: the classifier reads {shapes[0]} images, the score network makes {shapes[1]}"
            )
    under_head = None if discriminator_reads_images(opened) else trunk
    if under_head is None and not discriminator_reads_images(opened):
        head = None  # without what it stands on
    try:
        return Networks(
            denoiser=score,
            discriminator=noise_aware.Discriminator(under_head, head) if head is not None else None,
            classifier=noise_aware.NoisyClassifier(trunk) if trunk is not None else None,
            reference=nets.get("reference"),
            time=_time(score, opened.nets.get("classifier")),
        )
    except ValueError as error:
        raise UserError(f"bundle {opened.name}: {error}") from error


def one_hot(labels: Sequence[int] | Tensor, classes: int, count: int, device: torch.device) -> Tensor:
    """Rows [count, classes] of class indices.

    Raises:
        UserError: labels where there are no classes, out of range or of another number.
    """
    if not classes:
        raise UserError("this network is unconditional; leave the labels out")
    try:
        indices = torch.as_tensor(labels, device=device)
    except (ValueError, RuntimeError, OverflowError) as error:
        largest = max(labels, key=abs)  # of 64 bits and more
        raise UserError(f"label {largest} is out of range; this network knows classes 0 to {classes - 1}") from error
    if indices.is_floating_point():
        raise UserError("labels are class indices: whole numbers")
    indices = indices.long()
    if indices.shape != (count,):
        raise UserError(f"{indices.numel()} labels for {count} images; give one label an image")
    wrong = indices[(indices < 0) | (indices >= classes)]
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} is out of range; this network knows classes 0 to {classes - 1}")
    return F.one_hot(indices, classes).float()


def _time(score: ScoreNet, classifier: bundles.NetSpec | None) -> Callable[[Tensor], Tensor]:
    """t(sigma) as the bundle's classifier reads it, and a discriminator with it.

    A discrete-time score network has its own, which is taken where it has the same schedule, as in ADM's code.
    """
    schedule = classifier.time_schedule if classifier else None
    if isinstance(score, DDPMPrecond) and schedule in (None, score.noise_schedule):
        return score.time
    return TIME_SCHEDULES[schedule or (adm_time_schedule(image_shape(score)[-1]) if classifier else "linear")]


def discriminator_reads_images(bundle: bundles.Bundle) -> bool:
    """Whether the bundle's discriminator is a network of its own, rather than a head on the classifier's features."""
    head, score = bundle.nets.get("discriminator"), bundle.nets.get("score")
    if head is None or score is None or head.kind != "EncoderUNetModel":
        return False
    read = (head.keywords.get("in_channels"), head.keywords.get("image_size"))
    return read == (score.keywords.get("img_channels"), score.keywords.get("img_resolution"))


def roles(bundle: bundles.Bundle, guidance: GuidanceConfig | None) -> list[str]:
    """Roles that these weights need, or for None all that a sampler knows.

    What a guidance is named after stands before what it stands on.
    """
    if guidance is None:
        return ["score", *(role for role in bundle.nets if role not in ("score", "features", "generator"))]
    needed = [
        kind.roles[:1] if discriminator_reads_images(bundle) and kind.roles[0] == "discriminator" else kind.roles
        for kind in guiding(guidance)
        if kind.roles
    ]
    return list(dict.fromkeys(["score", *(role for each in needed for role in each)]))
