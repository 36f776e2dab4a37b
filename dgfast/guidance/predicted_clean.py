"""Guidance toward the predicted clean image (arXiv 2606.13347, algorithm 1, step 5): raise log p(y | x0hat)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.classifier import class_log_probability, classes_of, noise_aware_classifier
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import denoiser_gate, input_gradient, normalize_option, normalized
from dgfast.guidance.options import option
from dgfast.vp import vp_time

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.classifier import NoisyClassifier
    from dgfast.networks import Networks

CLEAN_TIMES = ("t", "0")


@dataclass(frozen=True, eq=False)
class PredictedCleanGuidance(Guidance):
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

    @dataclass(frozen=True)
    class Options:
        fidelity: float = option(
            0.0, "Toward the class in the predicted clean image x0; 0 turns it off.", "b", attribute="fidelity"
        )
        normalize: str = normalize_option()
        clean_time: str = option("t", "Classifier's time for the predicted clean image.", choices=CLEAN_TIMES)
        base_class: int | None = option(None, "Class of the --fidelity term; default: each image's own.", "y", least=0)

    classifier: NoisyClassifier
    fidelity: float | Tensor
    normalize: str = "none"
    base: int | None = None
    read_at_t: bool = True
    time: Callable[[Tensor], Tensor] = vp_time

    name = "guidance toward the predicted clean image"
    formula = "D + b sigma^2 grad_x0 log p(y | x0)"
    cost = "1 gradient"
    use = "to keep the class while something else pulls away"
    roles = ("classifier",)
    gradients = 1

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.fidelity < 0:
            raise UserError("fidelity is at least 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> PredictedCleanGuidance:
        how, label, read_at_t = config.normalize, config.base_class, config.clean_time == "t"
        classifier = noise_aware_classifier(networks, cls, "base class", label)
        return cls(classifier, config.fidelity, how, label, read_at_t, networks.time)

    @classmethod
    def classes(cls, networks: Networks, config: GuidanceConfig) -> int:
        return classes_of(networks.classifier) if config.base_class is None else 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.fidelity)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        import torch

        t = self.time(sigma if self.read_at_t else torch.zeros_like(sigma))

        def log_probability(x0hat: Tensor) -> Tensor:
            return class_log_probability(self.classifier(x0hat, t), class_labels, self.base)

        gradient, _ = input_gradient(log_probability, denoised)
        return normalized(gradient, self.normalize), self.fidelity * denoiser_gate(sigma), None
