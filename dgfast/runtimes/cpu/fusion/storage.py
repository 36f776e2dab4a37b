"""Where a region's values lie: the tensors it reads and writes, a core's scratch, and the numbers of its norms."""

import torch
from torch.fx import Node

from dgfast.runtimes.cpu.fusion.layout import Space
from dgfast.runtimes.cpu.fusion.operations import is_backward, result
from dgfast.runtimes.cpu.fusion.schedule import Schedule


class Storage:
    """Names of memory in the C++ code.

    Of norm number k, mean_k, rstd_k, scale_k and shift_k hold one number a channel: statistics, and what is to be
    multiplied and added; of a backward one the two averages that its gradient takes.

    Attributes:
        inputs: of what is read from outside, its index in `tensors`. norms: of every norm, its number k.
        places: of what is kept in memory, the pointer to its sample b, and the type there.
        scratch: floats that a sample takes beside the outputs. sums: floats that all norms sum up.
    """

    def __init__(self, schedule: Schedule, inputs: list[Node], batch: int) -> None:
        self.schedule, self.batch = schedule, batch
        self.inputs = {node: i for i, node in enumerate(inputs)}
        self.norms = {norm: k for k, norm in enumerate(schedule.norms)}
        self.sums = sum(2 * schedule.space(norm).channels for norm in self.norms)
        self.places: dict[Node, tuple[str, torch.dtype]] = {}
        for k, node in enumerate(schedule.written):
            if node in schedule.kept:
                self.places[node] = f"(out{k} + b * {element_count(schedule.space(node))})", result(node).dtype
        self.scratch = 0
        for node in schedule.nodes:
            if node in schedule.kept and node not in self.places:
                self.places[node] = f"(scratch + {self.scratch})", torch.float32
                self.scratch += element_count(schedule.space(node))

    def offset(self, norm: Node) -> int:
        """Where the sums of a norm begin: two a channel, one norm after another."""
        return sum(2 * self.schedule.space(n).channels for n, k in self.norms.items() if k < self.norms[norm])

    def times(self, weight: object) -> str:
        """The factor that a norm's weight is; nothing without one."""
        return f" * {self.input(weight, 'c')}" if weight is not None else ""

    def input(self, node: object, index: str) -> str:
        """An element of what is read from outside, as float."""
        of = self.schedule.of(node)  # type: ignore[arg-type]
        return reading(f"in{self.inputs[of]}", index, result(of).dtype)


def group_count(norm: Node) -> int:
    return int(norm.args[8] if is_backward(norm) else norm.args[6])  # type: ignore[arg-type]


def element_count(where: Space) -> int:
    return where.pixels * where.channels


def pixel_index(where: Space) -> str:
    return f"p * {where.channels} + c" if where.pixels > 1 else "c"


def literal(value: object) -> str:
    return f"{float(value)!r}f"  # type: ignore[arg-type]


def reading(place: str, index: str, dtype: torch.dtype) -> str:
    return f"{place}[{index}]" if dtype == torch.float32 else f"from_bfloat16({place}[{index}])"


def writing(place: str, index: str, dtype: torch.dtype, value: str) -> str:
    return f"{place}[{index}] = {value if dtype == torch.float32 else f'to_bfloat16({value})'};"
