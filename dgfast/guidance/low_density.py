"""Low-density guidance (arXiv 2606.13347, algorithm 1, step 4): away from what a classifier is sure of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.classifier import class_log_probability, classes_of, noise_aware_classifier
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import log_density_gradient, normalize_option, normalized
from dgfast.guidance.options import option
from dgfast.vp import vp_time

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.classifier import NoisyClassifier
    from dgfast.networks import Networks


@dataclass(frozen=True, eq=False)
class LowDensityGuidance(Guidance):
    """D' = D - diversity sigma^2 alpha N(grad_u log p(y | u, t(sigma))): it samples p(x | y) p(y | x)^-diversity.

    Images of a class that are hard to tell are rare ones; what is not an image at all is hard to tell too, which is why
    it goes with `PredictedCleanGuidance` or a discriminator.

    The paper states it as a shift of the ancestral mean, mu - a Sigma N(g). With N the identity, that and the form
    above are one guidance at two step sizes; for any N they are the same direction and the same limit of small steps
    (the probability-flow ODE has half of the SDE's score, here as everywhere). An ancestral solver therefore takes
    `direction` as it is and puts its own Sigma in the place of sigma^2 alpha, which only it can know: for the
    posterior variance that amounts to alpha' sigma'^2 at the next noise level sigma'.

    Attributes:
        classifier: as for `ClassifierGuidance`.
        diversity: a. Negative values guide toward the class (the paper's algorithm 2).
        normalize: N, see `gradient.normalized`. The paper says "Normalize" at 64 x 64 and nothing at 256 x 256, and not
            which. Default: none, for only then is `diversity` an exponent of p(y | x), and does guidance end where the
            classifier has nothing to say: a normalised gradient is as long there, and rounding noise.
        target: y for all samples, for mixing classes; None: each sample's own.
        time: the time t(sigma) that the classifier reads.
    """

    @dataclass(frozen=True)
    class Options:
        diversity: float = option(
            0.0, "Away from what the classifier is sure of; 0 turns it off.", "a", attribute="diversity"
        )
        perceptual: bool = option(False, "Turn --diversity round: toward the class.", inside=False)
        normalize: str = normalize_option()
        target_class: int | None = option(
            None, "Class of the --diversity term; default: each image's own.", "y", least=0
        )

    classifier: NoisyClassifier
    diversity: float | Tensor
    normalize: str = "none"
    target: int | None = None
    time: Callable[[Tensor], Tensor] = vp_time

    name = "low-density guidance"
    formula = "D - a sigma^2 grad_x log p(y | x)"
    cost = "1 gradient"
    use = "to sample what is rare in a class"
    roles = ("classifier",)
    gradients = 1

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.diversity < 0:
            raise UserError("diversity is at least 0; perceptual turns its direction round")
        if config.diversity and config.classifier_scale and config.target_class is None:
            raise UserError(
                "diversity and classifier_scale weigh one and the same gradient; set one of them to 0 "
                "(perceptual diversity is classifier guidance)"
            )

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> LowDensityGuidance:
        a = -config.diversity if config.perceptual else config.diversity
        classifier = noise_aware_classifier(networks, cls, "target class", config.target_class)
        return cls(classifier, a, config.normalize, config.target_class, networks.time)

    @classmethod
    def classes(cls, networks: Networks, config: GuidanceConfig) -> int:
        return classes_of(networks.classifier) if config.target_class is None else 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.diversity)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        def log_probability(u: Tensor) -> Tensor:
            return class_log_probability(self.classifier(u, self.time(sigma)), class_labels, self.target)

        gradient, gate, _ = log_density_gradient(log_probability, x, sigma)
        return normalized(gradient, self.normalize), -self.diversity * gate, None
