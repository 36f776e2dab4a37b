"""Pure functions as graphs: traced with their input gradient inside, lowered to inference operations, named, kept."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., tuple["Tensor", ...]]
"""A pure function of tensors (or None) that returns tensors."""
