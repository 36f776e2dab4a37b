"""In which order a region's operations are computed, in which loops, and what is kept between these.

Within a stage all that can be computed pixel by pixel is one loop. A sum over pixels, or pixels that are read in
another order, can be had in a later stage only. What a later stage reads is kept in memory, unless computing it anew is
as cheap.
"""

import operator
from collections.abc import Iterator, Sequence

from torch.fx import Node

from dgfast.runtimes.cpu.fusion.layout import Space, space
from dgfast.runtimes.cpu.fusion.operations import (
    EXPENSIVE,
    NORMS,
    POINTWISE,
    RESAMPLING,
    aten,
    images,
    is_backward,
    is_view,
    packet,
    result,
)

Stage = tuple[int, Space]
"""A level, which come one after another, and the loops of one of its spaces."""

_LOADS = 2  # what takes no more reads than this is computed anew


class Schedule:
    """The order of a region's operations.

    Attributes:
        nodes: operations, without those that are other names for a result. norms: the normalisations among them.
        written: results that go to memory outside; kept: operations whose results are in memory after their stage.
    """

    def __init__(self, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], batch: int) -> None:
        self._inside, self._batch = set(nodes), batch
        self.nodes = [n for n in nodes if not is_view(n) and n.target is not operator.getitem]
        self.norms = [node for node in self.nodes if packet(node) in NORMS]
        self._levels: dict[Node, int] = {}
        for node in self.nodes:
            self._levels[node] = self._level(node)
        self.written = [n for n in dict.fromkeys(map(self.of, outputs)) if n in self._inside]
        self.kept = {n for n in self.nodes if n in self.written or packet(n) is aten.cat}
        before = -1
        while before != len(self.kept):  # what is kept is cheap to read, which may make other things cheap
            before = len(self.kept)
            for stage, node in list(self._work()):
                self._keep_what_is_late(node, stage)

    def of(self, node: Node) -> Node:
        """The operation, or the input, that a node is another name for."""
        while node in self._inside and (is_view(node) or (node.target is operator.getitem and node.args[1] == 0)):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def space(self, node: Node) -> Space:
        """The loops over an operation's result, or over an input that is an image."""
        loops = space(result(node), self._batch)
        assert loops is not None
        return loops

    def stage(self, node: Node) -> Stage:
        """The first stage in which an operation can be computed; of inputs, the first of all."""
        return self._levels.get(node, 0), self.space(node)

    def sum_stages(self, norm: Node) -> list[Stage]:
        """The stages in which a norm's sums are taken: those of a forward one are the mean's and the variance's."""
        level, where = self.stage(norm)
        return [(level - k, where) for k in ((1,) if is_backward(norm) else (2, 1))]

    def stages(self) -> list[Stage]:
        """All stages in which something is to be done, in order."""
        return sorted({stage for stage, _ in self._work()}, key=lambda s: (s[0], s[1].pixels, s[1].channels))

    def statistics(self, node: Node) -> Node | None:
        """The norm in this region whose mean or deviation that is."""
        of = self.of(node)
        return of.args[0] if of in self._inside else None  # type: ignore[return-value]

    def is_read_from_memory(self, node: Node, stage: Stage) -> bool:
        """Whether what another stage has kept is there to be read."""
        return node in self.kept and (stage != self.stage(node) or packet(node) is aten.cat)

    def _operands(self, node: Node) -> list[Node]:
        """Operations in this region that an operation reads pixel by pixel, or as a vector for all pixels."""
        read = node.args if packet(node) in POINTWISE else images(node)
        return [n for n in (self.of(a) for a in read if isinstance(a, Node)) if n in self._levels]

    def _moves(self, operand: Node, node: Node) -> bool:
        """Whether an operation reads other pixels of the operand than the one that it is at."""
        kind = packet(node)
        return kind in RESAMPLING or (kind in POINTWISE and self.space(operand) != self.space(node))

    def _level(self, node: Node) -> int:
        kind = packet(node)
        level = max((self._levels[a] + self._moves(a, node) for a in self._operands(node)), default=0)
        if kind in NORMS:
            statistics = [self.statistics(a) for a in node.args[2:4]] if is_backward(node) else []  # type: ignore[arg-type]
            level = max([level, *(self._levels[n] for n in statistics if n is not None)])
            return level + (1 if is_backward(node) else 2)
        return level + 1 if kind is aten.cat else level

    def _work(self) -> Iterator[tuple[Stage, Node]]:
        """What has to be computed in which stage: values to be kept, or to be summed over pixels."""
        for node in self.nodes:
            if packet(node) is aten.cat:  # its parts are written into it one by one
                for part in map(self.of, images(node)):
                    yield self.stage(part), part
            elif node in self.kept:
                yield self.stage(node), node
        for norm in self.norms:
            for stage in self.sum_stages(norm):
                for operand in images(norm):
                    yield stage, self.of(operand)

    def _keep_what_is_late(self, node: Node, stage: Stage) -> None:
        """Follow what computing a value in a stage reads, and keep what must be there before."""
        if node not in self._levels or self.is_read_from_memory(node, stage):
            return
        if stage != self.stage(node) and self._cost(node) > _LOADS:
            self.kept.add(node)
            return
        for operand in self._operands(node):
            if self._moves(operand, node):
                self.kept.add(operand)
            else:
                self._keep_what_is_late(operand, stage)

    def _cost(self, node: Node) -> float:
        """Reads of an image that computing the operation anew takes; infinite if it is not to be."""
        kind = packet(node)
        if kind in EXPENSIVE or kind in RESAMPLING or kind is aten.cat:
            return float("inf")
        cost = 0.0
        for operand in node.args if kind in POINTWISE else images(node):
            if isinstance(operand, Node):
                of = self.of(operand)
                anew = of in self._levels and of not in self.kept
                cost += self._cost(of) if anew else result(of).numel() >= result(node).numel()
        return cost
