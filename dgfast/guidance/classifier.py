"""Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233): add the gradient of log p(y | x_t)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dgfast.guidance.gradient import log_density_gradient
from dgfast.noise_levels import vp_time

NoisyClassifier = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ClassifierGuidance:
    """D' = D + scale sigma^2 alpha grad_u log softmax(classifier(u, t(sigma)))[y].

    Samples without a class (a row of zeros in class_labels) are left alone.

    Attributes:
        classifier: (u [B, C, H, W] at VP scale, t [B] in [0, 1]) -> logits [B, label_dim]; frozen.
        scale: ADM's classifier scale; 0 guides nothing.
        time: the time t(sigma) that the classifier reads.
    """

    classifier: NoisyClassifier
    scale: float | Tensor
    time: Callable[[Tensor], Tensor] = vp_time

    evaluations = 0
    gradients = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        if class_labels is None:
            raise ValueError("classifier guidance needs class labels")

        def log_probability(u: Tensor) -> Tensor:
            logits = self.classifier(u, self.time(sigma)).float()
            return (F.log_softmax(logits, dim=-1) * class_labels).sum(-1)

        gradient, gate, _ = log_density_gradient(log_probability, x, sigma)
        return gradient, self.scale * gate, None
