"""What a guidance remembers from call to call, as one more argument and one more result of the pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dgfast.guidance.declaration import Guidance

if TYPE_CHECKING:
    from torch import Tensor

Made = Callable[..., "tuple[Tensor, ...]"]
MEMORY = ("memory", "memory_next")
"""Name of the argument and of the result, images [B, C, H, W] of zeros before the first call."""


class Memory:
    """The memory inside of one call: read and replaced there, by one guidance.

    Attributes:
        kept: images [B, C, H, W].
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept


def remembering(make: Callable[[Sequence[Guidance]], Made], guidances: Sequence[Guidance]) -> Made:
    """The function that `make` gives of the guidances, with the memory as last argument and last result."""
    return partial(_remembering, make, tuple(guidances))


def _remembering(
    make: Callable[[Sequence[Guidance]], Made], guidances: Sequence[Guidance], *arguments: Tensor
) -> tuple[Tensor, ...]:
    *others, kept = arguments
    memory = Memory(kept)
    own = [replace(one, memory=memory) if one.remembers else one for one in guidances]  # type: ignore[type-var]
    results = make(own)(*others)
    return *results, memory.kept.to(kept.dtype)
