"""Guidances: each maps a denoiser to a corrected denoiser by adding to its output; they compose by addition.

A gradient guidance toward a log-density l with weight w, in VE coordinates, is

    D'(x; sigma) = D(x; sigma) + w sigma^2 alpha grad_u l(u, t(sigma)),    u = alpha x,  alpha = 1 / sqrt(1 + sigma^2)

because the score is (D - x) / sigma^2 and a noise-aware network reads images at the VP process's unit scale.
"""

from dgfast.guidance.autoguidance import Autoguidance
from dgfast.guidance.classifier import ClassifierGuidance
from dgfast.guidance.classifier_free import ClassifierFreeGuidance
from dgfast.guidance.compose import Denoiser, Guidance, GuidedDenoiser, guided_denoiser, guided_posterior
from dgfast.guidance.discriminator import DiscriminatorGuidance
from dgfast.guidance.gradient import OUTSIDE_WINDOW
from dgfast.guidance.low_density import LowDensityGuidance
from dgfast.guidance.predicted_clean import PredictedCleanGuidance
from dgfast.guidance.reuse import CarriedGradient, gradient_keeping_denoiser
from dgfast.guidance.schedule import WeightSchedule

__all__ = [
    "OUTSIDE_WINDOW",
    "Autoguidance",
    "CarriedGradient",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Denoiser",
    "DiscriminatorGuidance",
    "Guidance",
    "GuidedDenoiser",
    "LowDensityGuidance",
    "PredictedCleanGuidance",
    "WeightSchedule",
    "gradient_keeping_denoiser",
    "guided_denoiser",
    "guided_posterior",
]
