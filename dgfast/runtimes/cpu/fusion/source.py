"""C++ code of one function for a region: every sample is read from memory once and stays in a core's cache.

All stages of a sample run before the next sample's, so that what passes between them fits into the cache. A core takes
a sample at a time; if there are fewer samples than cores, some cores share the pixels of a sample and wait for one
another after each level. Arithmetic is float32 whatever the tensors' type. The variance of a group is taken around its
mean, which takes a pass of its own.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dgfast.runtimes.cpu.fusion.layout import DTYPES, Space, strides
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
from dgfast.runtimes.cpu.fusion.schedule import Schedule, Stage
from dgfast.runtimes.cpu.native.sources import ELEMENTARY

Memory = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""


@dataclass(frozen=True)
class Code:
    """A region as `void run(long samples, long threads, float *workspace, void *const *tensors)`.

    Attributes:
        text: the function's code; it depends on everything but the number of samples.
        outputs: the tensors that it fills, which follow the inputs in `tensors`.
        results: of every output of the region, which of `tensors` holds it, and its own shape and strides.
        workspace: floats that it needs for each thread.
    """

    text: str
    outputs: tuple[Memory, ...]
    results: tuple[tuple[int, Memory], ...]
    workspace: int


def memory(value: Tensor) -> Memory:
    return tuple(value.shape), tuple(value.stride()), value.dtype


def write(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], batch: int) -> Code:
    """The code of a region: its operations in order, what they read from outside, what is read outside."""
    schedule = Schedule(nodes, inputs, outputs, batch)
    position = {node: i for i, node in enumerate([*inputs, *schedule.written])}
    text, workspace = _Text(schedule, list(inputs), batch).function()
    return Code(
        ELEMENTARY + text,
        tuple(memory(result(node)) for node in schedule.written),
        tuple((position[schedule.of(node)], memory(result(node))) for node in outputs),
        workspace,
    )


class _Text:
    """The text of the function.

    Of norm number k, mean_k, rstd_k, scale_k and shift_k hold one number a channel: statistics, and what is to be
    multiplied and added; of a backward one the two averages that its gradient takes.
    """

    def __init__(self, schedule: Schedule, inputs: list[Node], batch: int) -> None:
        self._schedule, self._batch = schedule, batch
        self._inputs = {node: i for i, node in enumerate(inputs)}
        self._numbers = {norm: k for k, norm in enumerate(schedule.norms)}
        self._places: dict[Node, tuple[str, torch.dtype]] = {}
        for k, node in enumerate(schedule.written):
            if node in schedule.kept:
                self._places[node] = f"(out{k} + b * {_size(schedule.space(node))})", result(node).dtype
        self._scratch = 0
        for node in schedule.nodes:
            if node in schedule.kept and node not in self._places:
                self._places[node] = f"(scratch + {self._scratch})", torch.float32
                self._scratch += _size(schedule.space(node))

    def function(self) -> tuple[str, int]:
        """The text, and the floats that each thread needs."""
        stages, lines = self._schedule.stages(), list(self._statistics_from_outside())
        for level in sorted({level for level, _ in stages}):
            for stage in (s for s in stages if s[0] == level):
                lines += self._loop(stage)
            lines += ["    SYNC", *self._finish(level)]
        sums = sum(2 * self._schedule.space(norm).channels for norm in self._numbers)
        head = _HEAD.format(scratch=self._scratch, sums=sums)
        return "\n".join([head, *self._pointers(), _SAMPLES, *lines, _TAIL]), self._scratch + sums

    def _pointers(self) -> Iterator[str]:
        for node, i in self._inputs.items():
            kind = DTYPES[result(node).dtype]
            yield f"  const {kind} *__restrict__ in{i} = (const {kind} *)tensors[{i}];"
        for k, node in enumerate(self._schedule.written):
            kind = DTYPES[result(node).dtype]
            yield f"  {kind} *__restrict__ out{k} = ({kind} *)tensors[{len(self._inputs) + k}];"

    def _statistics_from_outside(self) -> Iterator[str]:
        """Statistics that a backward norm reads, for each channel."""
        for norm, k in self._numbers.items():
            channels = self._schedule.space(norm).channels
            yield f"    float mean{k}[{channels}], rstd{k}[{channels}], scale{k}[{channels}], shift{k}[{channels}];"
            if is_backward(norm):
                groups, each = _groups(norm), channels // _groups(norm)
                for name, source in zip(("mean", "rstd"), norm.args[2:4], strict=True):
                    if self._schedule.statistics(source) is None:  # type: ignore[arg-type]
                        value = self._input(source, f"b * {groups} + g")
                        # two loops: g++ 12 gets a single one, with a division in its index, wrong
                        yield f"    if (busy) for (long g = 0; g < {groups}; ++g)"
                        yield f"      for (long i = 0; i < {each}; ++i) {name}{k}[g * {each} + i] = {value};"

    def _loop(self, stage: Stage) -> list[str]:
        """All that is computed in a stage, as one loop over pixels and channels."""
        where, values = stage[1], _Values(self, stage)
        sums = [s for norm in self._numbers if stage in self._schedule.sum_stages(norm) for s in values.sums(norm)]
        for node in self._schedule.nodes:
            if packet(node) is aten.cat:
                values.store_parts(node)
            elif node in self._schedule.kept and self._schedule.stage(node) == stage:
                values.store(node, node, f"p * {where.channels} + c")
        return [
            "    if (busy) {",
            *(f"      float *__restrict__ {name} = own + {at};" for name, at in sums),
            *(f"      zero({name}, {where.channels});" for name, _ in sums),
            f"      const long end = {where.pixels} * (part + 1) / together;",
            f"      for (long p = {where.pixels} * part / together; p < end; ++p) {{",
            "        #pragma omp simd",
            f"        for (long c = 0; c < {where.channels}; ++c) {{",
            *(f"          {line}" for line in values.lines),
            "        }",
            "      }",
            "    }",
        ]

    def _finish(self, level: int) -> Iterator[str]:
        """Statistics of groups from what was summed in this level."""
        for norm, k in self._numbers.items():
            levels = [stage[0] for stage in self._schedule.sum_stages(norm)]
            if level in levels:
                where = self._schedule.space(norm)
                first, second = (
                    f"averages(mates + {self.offset(norm) + i * where.channels}, together, SUMS, {where.channels}, "
                    f"{_groups(norm)}, {where.pixels}, "
                    for i in (0, 1)
                )
                if is_backward(norm):
                    yield f"    if (busy) {{ {first}scale{k}); {second}shift{k}); }}"
                elif level == levels[0]:
                    yield f"    if (busy) {{ {first}mean{k}); }}"
                else:
                    yield f"    if (busy) {{ {second}rstd{k});"
                    yield from self._scale_and_shift(norm, k)
                    yield "    }"

    def _scale_and_shift(self, norm: Node, k: int) -> Iterator[str]:
        _, weight, bias, *_, eps = norm.args
        channels = self._schedule.space(norm).channels
        yield f"      for (long c = 0; c < {channels}; ++c) {{"
        yield f"        rstd{k}[c] = 1.0f / __builtin_sqrtf(rstd{k}[c] + {_number(eps)});"
        yield f"        scale{k}[c] = rstd{k}[c]{self.times(weight)};"
        yield f"        shift{k}[c] = {self._input(bias, 'c') if bias else '0.0f'};"
        yield "      }"
        groups = _groups(norm)
        for i, node in enumerate(self._schedule.written):
            if node.target is operator.getitem and node.args[0] is norm:
                value = f"{('', 'mean', 'rstd')[int(node.args[1])]}{k}[g * {channels // groups}]"  # type: ignore[arg-type]
                store = _store(f"out{i}", f"b * {groups} + g", result(node).dtype, value)
                yield f"      if (part == 0) for (long g = 0; g < {groups}; ++g) {store}"

    def offset(self, norm: Node) -> int:
        """Where the sums of a norm begin: two a channel, one norm after another."""
        return sum(2 * self._schedule.space(n).channels for n, k in self._numbers.items() if k < self._numbers[norm])

    def times(self, weight: object) -> str:
        """The factor that a norm's weight is; nothing without one."""
        return f" * {self._input(weight, 'c')}" if weight is not None else ""

    def _input(self, node: object, index: str) -> str:
        of = self._schedule.of(node)  # type: ignore[arg-type]
        return _load(f"in{self._inputs[of]}", index, result(of).dtype)


class _Values:
    """The body of one loop: every value in it is computed once."""

    def __init__(self, text: _Text, stage: Stage) -> None:
        self.lines: list[str] = []
        self._text, self._schedule, self._stage = text, text._schedule, stage
        self._names: dict[Node, str] = {}

    def of(self, node: Node) -> str:
        """The name of an operation's value, or of an input's that is an image of the loop's size."""
        if node not in self._names:
            expression = self._expression(node)
            self._names[node] = f"v{len(self.lines)}"
            self.lines.append(f"const float {self._names[node]} = {expression};")
        return self._names[node]

    def store(self, node: Node, into: Node, index: str) -> None:
        place, kind = self._text._places[into]
        self.lines.append(_store(place, index, kind, self.of(node)))

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
        k, at, channels = self._text._numbers[norm], self._text.offset(norm), self._schedule.space(norm).channels
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
            f"({grad}{self._text.times(norm.args[4])})",
            f"(({x} - {self._statistic(norm, 2)}) * {self._statistic(norm, 3)})",
        )

    def _statistic(self, norm: Node, argument: int) -> str:
        within = self._schedule.statistics(norm.args[argument])  # type: ignore[arg-type]
        return f"{('mean', 'rstd')[argument - 2]}{self._text._numbers[norm if within is None else within]}[c]"

    def _expression(self, node: Node) -> str:
        if node in self._text._inputs:
            where = self._schedule.space(node)
            return self._text._input(node, f"b * {_size(where)} + {_index(where)}")
        if self._schedule.is_read_from_memory(node, self._stage):
            place, dtype = self._text._places[node]
            return _load(place, _index(self._schedule.space(node)), dtype)
        kind = packet(node)
        if kind in RESAMPLING:
            return self._resampled(node)
        if kind in NORMS:
            return self._normalised(node)
        return POINTWISE[kind](*(self._operand(a, node) for a in node.args))

    def _operand(self, operand: object, node: Node) -> str:
        if not isinstance(operand, Node):
            return _number(operand)
        if self._schedule.of(operand) not in self._text._inputs:
            return self.of(self._schedule.of(operand))
        read = strides(result(operand), result(node), self._text._batch)
        assert read is not None
        return self._text._input(operand, f"b * {read.sample} + p * {read.pixel} + c * {read.channel}")

    def _normalised(self, norm: Node) -> str:
        k = self._text._numbers[norm]
        if not is_backward(norm):
            x = self.of(self._schedule.of(images(norm)[0]))
            return f"({x} - mean{k}[c]) * scale{k}[c] + shift{k}[c]"
        gradient, normalised = self._weighted(norm)
        return f"{self._statistic(norm, 3)} * ({gradient} - scale{k}[c] - {normalised} * shift{k}[c])"

    def _resampled(self, node: Node) -> str:
        kind, source = packet(node), self._schedule.of(images(node)[0])
        channels, width = self._schedule.space(node).channels, result(node).shape[3]
        if source in self._text._places:
            place, dtype = self._text._places[source]
        else:
            size = _size(self._schedule.space(source))
            place, dtype = f"(in{self._text._inputs[source]} + b * {size})", result(source).dtype

        def pixel(y: str, x: str, row: int) -> str:
            return _load(place, f"(({y}) * {row} + {x}) * {channels} + c", dtype)

        y, x = f"p / {width}", f"p % {width}"
        if kind is aten.avg_pool2d:
            square = [pixel(f"{y} * 2 + {i}", f"{x} * 2 + {j}", 2 * width) for i in (0, 1) for j in (0, 1)]
            return f"0.25f * ({' + '.join(square)})"
        one = pixel(f"{y} / 2", f"({x}) / 2", width // 2)
        return f"0.25f * {one}" if kind is aten.avg_pool2d_backward else one


def _groups(norm: Node) -> int:
    return int(norm.args[8] if is_backward(norm) else norm.args[6])  # type: ignore[arg-type]


def _size(where: Space) -> int:
    return where.pixels * where.channels


def _index(where: Space) -> str:
    return f"p * {where.channels} + c" if where.pixels > 1 else "c"


def _number(value: object) -> str:
    return f"{float(value)!r}f"  # type: ignore[arg-type]


def _load(place: str, index: str, dtype: torch.dtype) -> str:
    return f"{place}[{index}]" if dtype == torch.float32 else f"from_bfloat16({place}[{index}])"


def _store(place: str, index: str, dtype: torch.dtype, value: str) -> str:
    return f"{place}[{index}] = {value if dtype == torch.float32 else f'to_bfloat16({value})'};"


_HEAD = """
#define SUMS {sums}L
#define SCRATCH {scratch}L
#define SYNC if (together > 1) {{ _Pragma("omp barrier") }}
extern "C" void run(long samples, long threads, float *workspace, void *const *tensors) {{"""

# Each core takes neighbouring samples, as libraries do, and the last one first: what the operation before wrote last,
# and what the next one reads first, is still in that core's cache.
_SAMPLES = """  #pragma omp parallel num_threads(threads)
  {
    const long count = omp_get_num_threads(), thread = omp_get_thread_num();
    const long together = samples >= count ? 1 : count / samples, crews = count / together;
    const long crew = thread / together, part = thread % together;
    float *own = workspace + threads * SCRATCH + thread * SUMS;
    const float *mates = workspace + threads * SCRATCH + crew * together * SUMS;
    float *__restrict__ scratch = workspace + crew * SCRATCH;
    const long begin = together > 1 ? crew : samples * crew / crews;
    for (long b = together > 1 ? crew : samples * (crew + 1) / crews - 1; b >= begin; --b) {
    const int busy = b < samples;"""

_TAIL = """    }
  }
}
"""
