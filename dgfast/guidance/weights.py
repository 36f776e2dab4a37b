"""The weights of guidances by name: what an exported function takes as inputs, so that one file serves them all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dgfast.guidance.declaration import Guidance


def weights(guidances: Sequence[Guidance], second: bool = False) -> dict[str, Any]:
    """The weights of each guidance, by the names that they have as inputs at the solver's first or second point.

    One without a declaration has none: its numbers are constants.
    """
    return {name: getattr(guidance, attribute) for guidance, name, attribute in _named(guidances, second)}


def images(guidances: Sequence[Guidance]) -> dict[str, Tensor]:
    """The images of each guidance, by the names that they have as inputs: [1 or B, C, H, W]."""
    return {name: image for guidance in guidances for name, image in guidance.images().items()}


def with_weights(
    guidances: Sequence[Guidance], inputs: Mapping[str, Tensor], second: bool = False
) -> tuple[Guidance, ...]:
    """The guidances with what these inputs hold in place of their own: weights, one number each, and images."""
    return tuple(
        replace(guidance, **{key: inputs[name] for _, name, key in _named([guidance], second)}).with_images(inputs)  # type: ignore[type-var]
        for guidance in guidances
    )


def _named(guidances: Sequence[Guidance], second: bool) -> Iterator[tuple[Guidance, str, str]]:
    """Each guidance with the names of its weights and the attributes that they are; one that is None is not there."""
    for guidance in guidances:
        for attribute, one in guidance.weights(second).items():
            if getattr(guidance, attribute) is not None:
                yield guidance, one.input, attribute
