"""Guidances: each maps a denoiser to a corrected denoiser by adding to its output; they compose by addition.

A gradient guidance toward a log-density l with weight w, in VE coordinates, is

    D'(x; sigma) = D(x; sigma) + w sigma^2 alpha grad_u l(u, t(sigma)),    u = alpha x,  alpha = 1 / sqrt(1 + sigma^2)

because the score is (D - x) / sigma^2 and a noise-aware network reads images at the VP process's unit scale.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dgfast.guidance.adaptive_projected import AdaptiveProjectedGuidance
from dgfast.guidance.autoguidance import Autoguidance
from dgfast.guidance.cfg_plus_plus import CFGPlusPlus
from dgfast.guidance.classifier import ClassifierGuidance
from dgfast.guidance.classifier_free import ClassifierFreeGuidance
from dgfast.guidance.declaration import GUIDANCES, Guidance, Repair
from dgfast.guidance.discriminator import DiscriminatorGuidance
from dgfast.guidance.frequency_decoupled import FrequencyDecoupledGuidance
from dgfast.guidance.gradient import OUTSIDE_WINDOW
from dgfast.guidance.loss import LossGuidance
from dgfast.guidance.low_density import LowDensityGuidance
from dgfast.guidance.magnitude_aware import MagnitudeAwareGuidance
from dgfast.guidance.observation import ObservationGuidance
from dgfast.guidance.operators import Mask
from dgfast.guidance.options import option
from dgfast.guidance.perturbed_attention import PerturbedAttentionGuidance
from dgfast.guidance.pixel_norm import PixelNorm
from dgfast.guidance.predicted_clean import PredictedCleanGuidance
from dgfast.guidance.renorm import Renorm
from dgfast.guidance.rescale import Rescale
from dgfast.guidance.schedule import WeightSchedule
from dgfast.guidance.skip_layer import SkipLayerGuidance
from dgfast.guidance.smoothed_energy import SmoothedEnergyGuidance
from dgfast.guidance.tangential import TangentialGuidance
from dgfast.guidance.thresholding import DynamicThreshold
from dgfast.guidance.unconditional import UnconditionalGuidance
from dgfast.guidance.zero_star import CFGZeroStar

if TYPE_CHECKING:
    from dgfast.guidance.compose import Denoiser, GuidedDenoiser, guided_denoiser, guided_posterior
    from dgfast.guidance.reuse import CarriedGradient, gradient_keeping_denoiser
    from dgfast.guidance.velocity import guided_velocity, of_velocities

__all__ = [
    "GUIDANCES",
    "OUTSIDE_WINDOW",
    "AdaptiveProjectedGuidance",
    "Autoguidance",
    "CFGPlusPlus",
    "CFGZeroStar",
    "CarriedGradient",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Denoiser",
    "DiscriminatorGuidance",
    "DynamicThreshold",
    "FrequencyDecoupledGuidance",
    "Guidance",
    "GuidedDenoiser",
    "LossGuidance",
    "LowDensityGuidance",
    "MagnitudeAwareGuidance",
    "Mask",
    "ObservationGuidance",
    "PerturbedAttentionGuidance",
    "PixelNorm",
    "PredictedCleanGuidance",
    "Renorm",
    "Repair",
    "Rescale",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TangentialGuidance",
    "UnconditionalGuidance",
    "WeightSchedule",
    "gradient_keeping_denoiser",
    "guided_denoiser",
    "guided_posterior",
    "guided_velocity",
    "of_velocities",
    "option",
]


def __getattr__(name: str) -> Any:  # what needs torch, which the declarations do without
    if name not in __all__:
        raise AttributeError(f"module 'dgfast.guidance' has no attribute {name!r}")
    homes = {
        "CarriedGradient": "reuse",
        "gradient_keeping_denoiser": "reuse",
        "guided_velocity": "velocity",
        "of_velocities": "velocity",
    }
    return getattr(import_module(f"dgfast.guidance.{homes.get(name, 'compose')}"), name)
