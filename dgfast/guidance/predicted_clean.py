"""Guidance toward the predicted clean image (arXiv 2606.13347, algorithm 1, step 5): raise log p(y | x0hat)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgfast.guidance.classifier import NoisyClassifier, class_log_probability
from dgfast.guidance.gradient import denoiser_gate, input_gradient, normalized
from dgfast.noise_levels import vp_time


@dataclass(frozen=True, eq=False)
class PredictedCleanGuidance:
    """D' = D + fidelity sigma^2 alpha N(grad_x0hat log p(y | x0hat)) at x0hat = D(x; sigma).

    The gradient is with respect to x0hat itself. It never goes through the score network, whose Jacobian the paper
    leaves out: one classifier gradient a call, which has to wait for the denoised image. The published shift of the
    ancestral mean is b Sigma N(g): what `LowDensityGuidance` says about Sigma holds here too. Classifier-free guidance
    and clip_denoised are in x0hat already, no gradient guidance is.

    Attributes:
        classifier: as for `ClassifierGuidance`.
        fidelity: b.
        normalize: N, as for `LowDensityGuidance`.
        base: y for all samples, for mixing classes; None: each sample's own.
        read_at_t: give the classifier the noisy image's time, else 0. The paper does not say. Default: the noisy
            image's. At 0 the classifier is told the truth, and takes at high noise a blurred average for a clean image;
            at t it distrusts what it sees while there is little to see, which anneals the term.
        time: the time t(sigma) that the classifier reads.
    """

    classifier: NoisyClassifier
    fidelity: float | Tensor
    normalize: str = "none"
    base: int | None = None
    read_at_t: bool = True
    time: Callable[[Tensor], Tensor] = vp_time

    evaluations = 0
    gradients = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.fidelity)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        t = self.time(sigma if self.read_at_t else torch.zeros_like(sigma))

        def log_probability(x0hat: Tensor) -> Tensor:
            return class_log_probability(self.classifier(x0hat, t), class_labels, self.base)

        gradient, _ = input_gradient(log_probability, denoised)
        return normalized(gradient, self.normalize), self.fidelity * denoiser_gate(sigma), None
