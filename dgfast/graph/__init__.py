"""Pure functions as graphs: traced with their input gradient inside, lowered to inference operations, named, kept."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., tuple["Tensor", ...]]
"""A pure function of tensors (or None) that returns tensors."""


def form(arguments: Sequence["Tensor | None"]) -> tuple[Any, ...]:
    """What a function is built for: shapes and types of its arguments, and which are None."""
    return tuple(None if x is None else (x.shape, x.dtype) for x in arguments)
