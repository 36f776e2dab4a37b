"""The body of one loop over a sample's pixels and channels, as C++."""

from torch.fx import Node

from dgfast.runtimes.cpu.fusion.layout import strides
from dgfast.runtimes.cpu.fusion.operations import (
    NORMS,
    POINTWISE,
    RESAMPLING,
    aten,
    images,
    is_backward,
    packet,
    result,
)
from dgfast.runtimes.cpu.fusion.schedule import Stage
from dgfast.runtimes.cpu.fusion.storage import Storage, element_count, literal, pixel_index, reading, writing


class LoopBody:
    """The body of one loop: every value in it is computed once."""

    def __init__(self, storage: Storage, stage: Stage) -> None:
        self.lines: list[str] = []
        self._storage, self._schedule, self._stage = storage, storage.schedule, stage
        self._names: dict[Node, str] = {}

    def of(self, node: Node) -> str:
        """The name of an operation's value, or of an input's that is an image of the loop's size."""
        if node not in self._names:
            expression = self._expression(node)
            self._names[node] = f"v{len(self.lines)}"
            self.lines.append(f"const float {self._names[node]} = {expression};")
        return self._names[node]

    def store(self, node: Node, into: Node, index: str) -> None:
        place, kind = self._storage.places[into]
        self.lines.append(writing(place, index, kind, self.of(node)))

    def store_parts(self, cat: Node) -> None:
        """Write those parts of a concatenation that this stage computes."""
        start = 0
        for part in map(self._schedule.of, images(cat)):
            stage = self._schedule.stage(part)
            if stage == self._stage:
                self.store(part, cat, f"p * {self._schedule.space(cat).channels} + {start} + c")
            start += stage[1].channels

    def sums(self, norm: Node) -> list[tuple[str, int]]:
        """Sum over pixels what a norm needs of this stage; names of the sums, and their places."""
        k, at, channels = self._storage.norms[norm], self._storage.offset(norm), self._schedule.space(norm).channels
        if is_backward(norm):
            gradient, normalised = self._weighted(norm)
            self.lines.append(f"sum{k}[c] += {gradient}; product{k}[c] += {gradient} * {normalised};")
            return [(f"sum{k}", at), (f"product{k}", at + channels)]
        x = self.of(self._schedule.of(images(norm)[0]))
        if self._stage == self._schedule.sum_stages(norm)[0]:
            self.lines.append(f"sum{k}[c] += {x};")
            return [(f"sum{k}", at)]
        self.lines.append(f"square{k}[c] += ({x} - mean{k}[c]) * ({x} - mean{k}[c]);")
        return [(f"square{k}", at + channels)]

    def _weighted(self, norm: Node) -> tuple[str, str]:
        """The gradient that a backward norm gets, times its weight, and the normalised values."""
        grad, x = (self.of(self._schedule.of(a)) for a in images(norm))
        return (
            f"({grad}{self._storage.times(norm.args[4])})",
            f"(({x} - {self._statistic(norm, 2)}) * {self._statistic(norm, 3)})",
        )

    def _statistic(self, norm: Node, argument: int) -> str:
        within = self._schedule.statistics(norm.args[argument])  # type: ignore[arg-type]
        return f"{('mean', 'rstd')[argument - 2]}{self._storage.norms[norm if within is None else within]}[c]"

    def _expression(self, node: Node) -> str:
        if node in self._storage.inputs:
            where = self._schedule.space(node)
            return self._storage.input(node, f"b * {element_count(where)} + {pixel_index(where)}")
        if self._schedule.is_read_from_memory(node, self._stage):
            place, dtype = self._storage.places[node]
            return reading(place, pixel_index(self._schedule.space(node)), dtype)
        kind = packet(node)
        if kind in RESAMPLING:
            return self._resampled(node)
        if kind in NORMS:
            return self._normalised(node)
        return POINTWISE[kind](*(self._operand(a, node) for a in node.args))

    def _operand(self, operand: object, node: Node) -> str:
        if not isinstance(operand, Node):
            return literal(operand)
        if self._schedule.of(operand) not in self._storage.inputs:
            return self.of(self._schedule.of(operand))
        read = strides(result(operand), result(node), self._storage.batch)
        assert read is not None
        return self._storage.input(operand, f"b * {read.sample} + p * {read.pixel} + c * {read.channel}")

    def _normalised(self, norm: Node) -> str:
        k = self._storage.norms[norm]
        if not is_backward(norm):
            x = self.of(self._schedule.of(images(norm)[0]))
            return f"({x} - mean{k}[c]) * scale{k}[c] + shift{k}[c]"
        gradient, normalised = self._weighted(norm)
        return f"{self._statistic(norm, 3)} * ({gradient} - scale{k}[c] - {normalised} * shift{k}[c])"

    def _resampled(self, node: Node) -> str:
        kind, source = packet(node), self._schedule.of(images(node)[0])
        channels, width = self._schedule.space(node).channels, result(node).shape[3]
        if source in self._storage.places:
            place, dtype = self._storage.places[source]
        else:
            size = element_count(self._schedule.space(source))
            place, dtype = f"(in{self._storage.inputs[source]} + b * {size})", result(source).dtype

        def pixel(y: str, x: str, row: int) -> str:
            return reading(place, f"(({y}) * {row} + {x}) * {channels} + c", dtype)

        y, x = f"p / {width}", f"p % {width}"
        if kind is aten.avg_pool2d:
            square = [pixel(f"{y} * 2 + {i}", f"{x} * 2 + {j}", 2 * width) for i in (0, 1) for j in (0, 1)]
            return f"0.25f * ({' + '.join(square)})"
        one = pixel(f"{y} / 2", f"({x}) / 2", width // 2)
        return f"0.25f * {one}" if kind is aten.avg_pool2d_backward else one
