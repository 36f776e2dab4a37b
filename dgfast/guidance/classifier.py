"""Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233): add the gradient of log p(y | x_t)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dgfast.guidance.gradient import log_density_gradient
from dgfast.guidance.schedule import CONSTANT, WeightSchedule
from dgfast.noise_levels import vp_time

NoisyClassifier = Callable[[Tensor, Tensor], Tensor]


def class_log_probability(logits: Tensor, class_labels: Tensor | None, label: int | None = None) -> Tensor:
    """log p(y | u) [B] of the logits [B, classes]: y is `label` for all samples, or each sample's own class.

    Samples without a class (a row of zeros in class_labels) get 0, and so no gradient.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    if label is not None:
        return log_probabilities[:, label]
    if class_labels is None:
        raise ValueError("guidance toward a class needs class labels")
    return (log_probabilities * class_labels).sum(-1)


@dataclass(frozen=True, eq=False)
class ClassifierGuidance:
    """D' = D + scale sigma^2 alpha grad_u log softmax(classifier(u, t(sigma)))[y].

    Samples without a class (a row of zeros in class_labels) are left alone.

    Attributes:
        classifier: (u [B, C, H, W] at VP scale, t [B] in [0, 1]) -> logits [B, label_dim]; frozen.
        scale: ADM's classifier scale; 0 guides nothing.
        time: the time t(sigma) that the classifier reads.
        schedule: factor on the scale along the trajectory.
    """

    classifier: NoisyClassifier
    scale: float | Tensor
    time: Callable[[Tensor], Tensor] = vp_time
    schedule: WeightSchedule = CONSTANT

    evaluations = 0
    gradients = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale) and self.schedule.active(sigma_low, sigma_high)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        def log_probability(u: Tensor) -> Tensor:
            return class_log_probability(self.classifier(u, self.time(sigma)), class_labels)

        gradient, gate, _ = log_density_gradient(log_probability, x, sigma)
        return gradient, self.scale * self.schedule(sigma) * gate, None
