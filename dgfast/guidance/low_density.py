"""Low-density guidance (arXiv 2606.13347, algorithm 1, step 4): away from what a classifier is sure of."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dgfast.guidance.classifier import NoisyClassifier, class_log_probability
from dgfast.guidance.gradient import log_density_gradient, normalized
from dgfast.noise_levels import vp_time


@dataclass(frozen=True, eq=False)
class LowDensityGuidance:
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

    classifier: NoisyClassifier
    diversity: float | Tensor
    normalize: str = "none"
    target: int | None = None
    time: Callable[[Tensor], Tensor] = vp_time

    evaluations = 0
    gradients = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.diversity)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        def log_probability(u: Tensor) -> Tensor:
            return class_log_probability(self.classifier(u, self.time(sigma)), class_labels, self.target)

        gradient, gate, _ = log_density_gradient(log_probability, x, sigma)
        return normalized(gradient, self.normalize), -self.diversity * gate, None
