"""The weights of guidances by name: what an exported function takes as inputs, so that one file serves them all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dgfast.errors import UserError
from dgfast.guidance.autoguidance import Autoguidance
from dgfast.guidance.classifier import ClassifierGuidance
from dgfast.guidance.classifier_free import ClassifierFreeGuidance
from dgfast.guidance.compose import Guidance
from dgfast.guidance.discriminator import DiscriminatorGuidance

OFF = {"dg_weight": 0.0, "dg_weight_2nd": 0.0, "classifier_scale": 0.0, "cfg_scale": 1.0, "autoguidance": 1.0}
"""Names of the weights, as in `GuidanceConfig`, and the value at which each of them guides nothing."""

_FIELDS: dict[type, tuple[str, str]] = {
    DiscriminatorGuidance: ("dg_weight", "weight"),
    ClassifierGuidance: ("classifier_scale", "scale"),
    ClassifierFreeGuidance: ("cfg_scale", "scale"),
    Autoguidance: ("autoguidance", "weight"),
}


def weights(guidances: Sequence[Guidance]) -> dict[str, Any]:
    """The weight of each guidance, by name.

    Raises:
        UserError: a guidance that a weight alone does not describe.
    """
    for guidance in guidances:
        if type(guidance) not in _FIELDS or getattr(guidance, "boost", 1.0) != 1:
            raise UserError(f"{type(guidance).__name__} with boosting, or of your own, is in no exported file")
    named = [(guidance, *_FIELDS[type(guidance)]) for guidance in guidances]
    return {name: getattr(guidance, field) for guidance, name, field in named}


def with_weights(guidances: Sequence[Guidance], given: Mapping[str, Tensor]) -> tuple[Guidance, ...]:
    """The guidances with the weights `given`, one number each, in place of their own."""
    named = [(guidance, *_FIELDS[type(guidance)]) for guidance in guidances]
    return tuple(replace(guidance, **{field: given[name]}) for guidance, name, field in named)  # type: ignore[type-var]
