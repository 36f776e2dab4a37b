"""A guided function that says which guidances are inside of it."""

from dataclasses import dataclass

from torch import Tensor

from dgfast.graph import Function
from dgfast.guidance.declaration import Guidance


@dataclass(frozen=True)
class Guided:
    """A pure function and its guidances: an exported file that takes its place asks for their weights alone."""

    function: Function
    guidances: tuple[Guidance, ...]

    def __call__(self, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        return self.function(*arguments)
