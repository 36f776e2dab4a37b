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

from dgfast.runtimes.cpu.fusion.layout import DTYPES
from dgfast.runtimes.cpu.fusion.loop_body import LoopBody
from dgfast.runtimes.cpu.fusion.operations import (
    aten,
    is_backward,
    packet,
    result,
)
from dgfast.runtimes.cpu.fusion.schedule import Schedule, Stage
from dgfast.runtimes.cpu.fusion.storage import Storage, group_count, literal, writing
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
    text, workspace = _Text(Storage(schedule, list(inputs), batch)).function()
    return Code(
        ELEMENTARY + text,
        tuple(memory(result(node)) for node in schedule.written),
        tuple((position[schedule.of(node)], memory(result(node))) for node in outputs),
        workspace,
    )


class _Text:
    """The text of the function."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._schedule, self._norms = storage, storage.schedule, storage.norms

    def function(self) -> tuple[str, int]:
        """The text, and the floats that each thread needs."""
        stages, lines = self._schedule.stages(), list(self._statistics_from_outside())
        for level in sorted({level for level, _ in stages}):
            for stage in (s for s in stages if s[0] == level):
                lines += self._loop(stage)
            lines += ["    SYNC", *self._finish(level)]
        scratch, sums = self._storage.scratch, self._storage.sums
        head = _HEAD.format(scratch=scratch, sums=sums)
        return "\n".join([head, *self._pointers(), _SAMPLES, *lines, _TAIL]), scratch + sums

    def _pointers(self) -> Iterator[str]:
        for node, i in self._storage.inputs.items():
            kind = DTYPES[result(node).dtype]
            yield f"  const {kind} *__restrict__ in{i} = (const {kind} *)tensors[{i}];"
        for k, node in enumerate(self._schedule.written):
            kind = DTYPES[result(node).dtype]
            yield f"  {kind} *__restrict__ out{k} = ({kind} *)tensors[{len(self._storage.inputs) + k}];"

    def _statistics_from_outside(self) -> Iterator[str]:
        """Statistics that a backward norm reads, for each channel."""
        for norm, k in self._norms.items():
            channels = self._schedule.space(norm).channels
            yield f"    float mean{k}[{channels}], rstd{k}[{channels}], scale{k}[{channels}], shift{k}[{channels}];"
            if is_backward(norm):
                groups, each = group_count(norm), channels // group_count(norm)
                for name, source in zip(("mean", "rstd"), norm.args[2:4], strict=True):
                    if self._schedule.statistics(source) is None:  # type: ignore[arg-type]
                        value = self._storage.input(source, f"b * {groups} + g")
                        # two loops: g++ 12 gets a single one, with a division in its index, wrong
                        yield f"    if (busy) for (long g = 0; g < {groups}; ++g)"
                        yield f"      for (long i = 0; i < {each}; ++i) {name}{k}[g * {each} + i] = {value};"

    def _loop(self, stage: Stage) -> list[str]:
        """All that is computed in a stage, as one loop over pixels and channels."""
        where, values = stage[1], LoopBody(self._storage, stage)
        sums = [s for norm in self._norms if stage in self._schedule.sum_stages(norm) for s in values.sums(norm)]
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
        for norm, k in self._norms.items():
            levels = [stage[0] for stage in self._schedule.sum_stages(norm)]
            if level in levels:
                where = self._schedule.space(norm)
                start = self._storage.offset(norm)
                first, second = (
                    f"averages(mates + {start + i * where.channels}, together, SUMS, {where.channels}, "
                    f"{group_count(norm)}, {where.pixels}, "
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
        yield f"        rstd{k}[c] = 1.0f / __builtin_sqrtf(rstd{k}[c] + {literal(eps)});"
        yield f"        scale{k}[c] = rstd{k}[c]{self._storage.times(weight)};"
        yield f"        shift{k}[c] = {self._storage.input(bias, 'c') if bias else '0.0f'};"
        yield "      }"
        groups = group_count(norm)
        for i, node in enumerate(self._schedule.written):
            if node.target is operator.getitem and node.args[0] is norm:
                value = f"{('', 'mean', 'rstd')[int(node.args[1])]}{k}[g * {channels // groups}]"  # type: ignore[arg-type]
                store = writing(f"out{i}", f"b * {groups} + g", result(node).dtype, value)
                yield f"      if (part == 0) for (long g = 0; g < {groups}; ++g) {store}"


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
