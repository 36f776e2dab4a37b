"""The weights of guidances by name: what an exported function takes as inputs, so that one file serves them all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dgfast.errors import UserError
from dgfast.guidance.autoguidance import Autoguidance
from dgfast.guidance.classifier import ClassifierGuidance
from dgfast.guidance.classifier_free import ClassifierFreeGuidance
from dgfast.guidance.compose import Guidance
from dgfast.guidance.discriminator import DiscriminatorGuidance
from dgfast.guidance.low_density import LowDensityGuidance
from dgfast.guidance.predicted_clean import PredictedCleanGuidance

OFF = {
    "dg_weight": 0.0, "dg_weight_2nd": 0.0, "dg_boost": 1.0, "classifier_scale": 0.0, "cfg_scale": 1.0,
    "cfg_scale_low": 1.0, "autoguidance": 1.0, "diversity": 0.0, "fidelity": 0.0,
}  # fmt: skip
"""Names of the weights, as in `GuidanceConfig`, and the value at which each of them guides nothing.

`dg_boost` is the factor that boosting puts on `dg_weight`; a perceptual `diversity` is a negative one.
"""

_FIELDS: dict[type, dict[str, str]] = {
    DiscriminatorGuidance: {"dg_weight": "weight", "dg_boost": "boost"},
    ClassifierGuidance: {"classifier_scale": "scale"},
    ClassifierFreeGuidance: {"cfg_scale": "scale", "cfg_scale_low": "scale_low"},
    Autoguidance: {"autoguidance": "weight"},
    LowDensityGuidance: {"diversity": "diversity"},
    PredictedCleanGuidance: {"fidelity": "fidelity"},
}
_ABSENT = {"dg_boost": 1.0, "cfg_scale_low": None}
"""Weights that not every guidance of their kind has, and what stands there where it has not."""


def weights(guidances: Sequence[Guidance]) -> dict[str, Any]:
    """The weights of each guidance, by name.

    Raises:
        UserError: a guidance that its weights alone do not describe.
    """
    return {name: getattr(guidance, field) for guidance, name, field in _named(guidances)}


def with_weights(guidances: Sequence[Guidance], given: Mapping[str, Tensor]) -> tuple[Guidance, ...]:
    """The guidances with the weights `given`, one number each, in place of their own."""
    return tuple(
        replace(guidance, **{field: given[name] for _, name, field in _named([guidance])})  # type: ignore[type-var]
        for guidance in guidances
    )


def _named(guidances: Sequence[Guidance]) -> Iterator[tuple[Guidance, str, str]]:
    """Each guidance with the names of its weights and the attributes that they are."""
    for guidance in guidances:
        if type(guidance) not in _FIELDS:
            raise UserError(f"{type(guidance).__name__}, a guidance of your own, is in no exported file")
        for name, field in _FIELDS[type(guidance)].items():
            if name not in _ABSENT or getattr(guidance, field) != _ABSENT[name]:
                yield guidance, name, field
