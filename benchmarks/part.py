"""What a part of benchmarks/gpu.py is, and what it is run with."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import Call, seconds
from benchmarks.tables import Row

Rows = Iterator[Row | None]
"""Rows of tables. What comes before a None may run beside other parts; after it the part has the machine for itself."""


@dataclass(frozen=True)
class Setting:
    """Where all parts run.

    Attributes:
        small: toys in place of full-size networks, nothing compiled, one round of everything.
        out: folder for what is no table.
    """

    device: torch.device
    small: bool
    out: Path

    @property
    def workload(self) -> str:
        return "tiny" if self.small else "edm-cifar10"

    @property
    def runtime(self) -> str:
        return "eager" if self.small else "compiled"

    @property
    def compilers(self) -> tuple[str, ...]:
        """Runtimes that make the same kernels: ahead of time, and by torch.compile."""
        return ("eager",) if self.small else ("package", "inductor")

    def batch(self, size: int) -> int:
        return 2 if self.small else size

    def rounds(self, count: int) -> int:
        return 1 if self.small else count

    def milliseconds(self, call: Call, count: int) -> float:
        """The median of so many rounds, after one that warms up."""
        call()
        return 1e3 * statistics.median(seconds(call) for _ in range(self.rounds(count)))


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        compiling: core-seconds before it yields None. measuring: seconds after that.
        new: it never ran on a GPU.
    """

    name: str
    run: Callable[[Setting], Rows]
    compiling: float
    measuring: float
    new: bool = False
