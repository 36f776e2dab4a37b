"""The images of a job in chunks, each drawn in one batch and written at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import Tensor

from dgfast.ranges import Ranges


@dataclass(frozen=True)
class Chunk:
    """A chunk.

    Attributes:
        index: its place in the job. seeds: one an image.
        labels: one class index a seed; None takes those that the seeds give.
        conditions: of a denoiser that declares some, one row a seed each; see `conditions.given`.
    """

    index: int
    seeds: Ranges
    labels: Sequence[int] | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


class Chunks(Sequence[Chunk]):
    """The images of a job in chunks of one size, the last one smaller.

    Args:
        labels: class indices, repeated over the seeds; None leaves them to the seeds.
    """

    def __init__(self, seeds: Ranges, labels: Ranges | None, size: int) -> None:
        self.seeds, self.labels, self.size = seeds, labels, size

    def __len__(self) -> int:
        return math.ceil(len(self.seeds) / self.size)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = index * self.size
        seeds = self.seeds[start : start + self.size]
        if self.labels is None:
            return Chunk(index, seeds)
        return Chunk(index, seeds, [self.labels[k % len(self.labels)] for k in range(start, start + len(seeds))])

    def images(self, indices: Ranges) -> int:
        """How many images these chunks have."""
        short = len(self) * self.size - len(self.seeds)
        return len(indices) * self.size - (short if indices.largest == len(self) - 1 else 0)
