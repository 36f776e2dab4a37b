"""Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233): add the gradient of log p(y | x_t)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import log_density_gradient
from dgfast.guidance.options import option
from dgfast.guidance.schedule import CONSTANT, WeightSchedule
from dgfast.vp import vp_time

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

    NoisyClassifier = Callable[[Tensor, Tensor], Tensor]


def class_log_probability(logits: Tensor, class_labels: Tensor | None, label: int | None = None) -> Tensor:
    """log p(y | u) [B] of the logits [B, classes]: y is `label` for all samples, or each sample's own class.

    Samples without a class (a row of zeros in class_labels) get 0, and so no gradient.
    """
    log_probabilities = logits.float().log_softmax(-1)
    if label is not None:
        return log_probabilities[:, label]
    if class_labels is None:
        raise ValueError("guidance toward a class needs class labels")
    return (log_probabilities * class_labels).sum(-1)


def classes_of(classifier: object) -> int:
    """The classes of a classifier that says them, as dgfast's do; else 0, for not known."""
    return getattr(classifier, "classes", 0)


def noise_aware_classifier(
    networks: Networks, guidance: type[Guidance], role: str = "", label: int | None = None
) -> NoisyClassifier:
    """The classifier, if it is noise-aware and knows the class `label`, or for None those that labels choose among.

    Raises:
        UserError: it does not, or there is none. It names the guidance, and the label's role.
    """
    classifier = guidance.needed(networks.classifier, "classifier")
    try:
        inspect.signature(getattr(classifier, "forward", classifier)).bind(None, None)
    except TypeError:
        raise UserError(
            f"{guidance.name} needs a noise-aware classifier, (u, t) -> logits; this one takes no time"
        ) from None
    own, classes = networks.denoiser.label_dim, classes_of(classifier)
    if label is None and not (own or classes):
        either = f", a {role}," if role else ""
        raise UserError(
            f"{guidance.name} needs a conditional score network{either} or a classifier that says its classes"
        )
    if label is None and own and classes not in (0, own):
        raise UserError(
            f"the classifier knows {classes} classes, the score network {own}: no classifier guidance between them"
        )
    count = classes or own
    if label is not None and count and label >= count:
        raise UserError(f"{role} {label} is out of range; the classifier knows classes 0 to {count - 1}")
    return classifier


@dataclass(frozen=True, eq=False)
class ClassifierGuidance(Guidance):
    """D' = D + scale sigma^2 alpha grad_u log softmax(classifier(u, t(sigma)))[y].

    Samples without a class (a row of zeros in class_labels) are left alone.

    Attributes:
        classifier: (u [B, C, H, W] at VP scale, t [B] in [0, 1]) -> logits [B, label_dim]; frozen.
        scale: ADM's classifier scale; 0 guides nothing.
        time: the time t(sigma) that the classifier reads.
        schedule: factor on the scale along the trajectory.
    """

    @dataclass(frozen=True)
    class Options:
        classifier_scale: float = option(0.0, "Scale; 0 turns it off.", "s", attribute="scale")
        classifier_schedule: tuple[tuple[float, float], ...] = option(
            (), "Factor on --classifier-scale, as --dg-schedule.", "tau:factor,..."
        )

    classifier: NoisyClassifier
    scale: float | Tensor
    time: Callable[[Tensor], Tensor] = vp_time
    schedule: WeightSchedule = CONSTANT

    name = "classifier guidance"
    formula = "D + s sigma^2 grad_x log p(y | x)"
    cost = "1 gradient"
    use = "to make samples typical of their class"
    roles = ("classifier",)
    gradients = 1

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> ClassifierGuidance:
        classifier, schedule = noise_aware_classifier(networks, cls), WeightSchedule(config.classifier_schedule)
        return cls(classifier, config.classifier_scale, networks.time, schedule)

    @classmethod
    def classes(cls, networks: Networks, config: GuidanceConfig) -> int:
        return classes_of(networks.classifier)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale) and self.schedule.active(sigma_low, sigma_high)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        def log_probability(u: Tensor) -> Tensor:
            return class_log_probability(self.classifier(u, self.time(sigma)), class_labels)

        gradient, gate, _ = log_density_gradient(log_probability, x, sigma)
        return gradient, self.scale * self.schedule(sigma) * gate, None
