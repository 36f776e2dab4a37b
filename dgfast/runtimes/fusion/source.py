"""C++ code of one function for a region: every sample is read from memory once and stays in a core's cache.

Operations come in stages. Within a stage all that can be computed pixel by pixel is one loop; a sum over pixels, and
pixels that are read in another order, end it. All stages of a sample run before the next sample's, so that what passes
between them fits into the cache. A core takes a sample at a time; if there are fewer samples than cores, the cores
share the pixels of a sample and wait for one another after each stage.

Arithmetic is float32 whatever the tensors' type. The variance of a group takes its mean from a pass of its own.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from dgfast.runtimes.fusion.layout import DTYPES, Space, roles, space, strides
from dgfast.runtimes.fusion.operations import (
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
Memory = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""

_LOADS = 2  # what takes no more reads than this is computed anew in a later stage and not kept


@dataclass(frozen=True)
class Code:
    """A region as one C++ function `void region(long samples, long threads, float *scratch, void *const *tensors)`.

    Attributes:
        text: the function's code; it depends on everything but the number of samples.
        outputs: the tensors that it fills, which follow the inputs in `tensors`.
        results: of every output of the region, which tensor holds it, counted from the inputs on, and its own shape.
        scratch, sums: floats that it needs for a sample, and for a thread.
    """

    text: str
    outputs: tuple[Memory, ...]
    results: tuple[tuple[int, Memory], ...]
    scratch: int
    sums: int


def memory(value: Tensor) -> Memory:
    return tuple(value.shape), tuple(value.stride()), value.dtype


def write(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], batch: int) -> Code:
    """The code of a region: its operations in order, what they read from outside, what is read outside."""
    return _Writer(nodes, inputs, outputs, batch).code()


class _Writer:
    def __init__(self, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node], batch: int) -> None:
        inside = set(nodes)
        self._batch = batch
        self._inputs = {node: i for i, node in enumerate(inputs)}
        self._inside = inside
        self._results = [self._of(node) for node in outputs]
        self._result_values = [result(node) for node in outputs]
        self._nodes = [n for n in nodes if not is_view(n) and n.target is not operator.getitem]
        self._norms = {node: k for k, node in enumerate(n for n in self._nodes if packet(n) in NORMS)}
        self._spaces = {node: self._space(node) for node in self._nodes}
        self._levels: dict[Node, int] = {}
        for node in self._nodes:
            self._levels[node] = self._level(node)
        self._written = [n for n in dict.fromkeys(self._results) if n not in self._inputs]
        self._kept = {n for n in self._written if n in self._levels} | {n for n in self._nodes if packet(n) is aten.cat}
        self._keep_what_is_read_later()

    def _of(self, node: Node) -> Node:
        """The operation, or the input, that a node is another name for."""
        while node in self._inside and (is_view(node) or (node.target is operator.getitem and node.args[1] == 0)):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _space(self, node: Node) -> Space:
        found = space(result(node), self._batch)
        assert found is not None
        return found

    def _operands(self, node: Node) -> list[Node]:
        """Operations inside of the region that an operation reads pixel by pixel, or as a vector for all pixels."""
        kind = packet(node)
        read = node.args if kind in POINTWISE else images(node)
        return [n for n in (self._of(a) for a in read if isinstance(a, Node)) if n in self._spaces]

    def _level(self, node: Node) -> int:
        """The first stage in which the operation's values can be computed."""
        kind = packet(node)
        level = max((self._after(operand, node) for operand in self._operands(node)), default=0)
        if kind in NORMS:
            statistics = [self._statistics_of(a) for a in node.args[2:4]] if is_backward(node) else []
            level = max([level, *(self._levels[n] for n in statistics if n is not None)])
            return level + (1 if is_backward(node) else 2)
        return level + 1 if kind is aten.cat else level

    def _after(self, operand: Node, node: Node) -> int:
        moves = packet(node) in RESAMPLING or (
            packet(node) in POINTWISE and self._spaces[operand] != self._spaces[node]
        )
        return self._levels[operand] + moves

    def _statistics_of(self, node: object) -> Node | None:
        """The norm in this region whose mean or deviation that is."""
        of = self._of(node)  # type: ignore[arg-type]
        return of.args[0] if of in self._inside else None  # type: ignore[return-value]

    def _stage(self, node: Node) -> Stage:
        return self._levels[node], self._spaces[node]

    # What is kept in memory between stages

    def _keep_what_is_read_later(self) -> None:
        before = -1
        while before != len(self._kept):
            before = len(self._kept)
            for stage, node in self._work():
                self._visit(node, stage)

    def _work(self) -> Iterator[tuple[Stage, Node]]:
        """What has to be computed in which stage: values to be kept, or summed over pixels."""
        for node in self._nodes:
            if packet(node) is aten.cat:
                for part in (self._of(a) for a in images(node)):
                    yield self._part_stage(part, node), part
            elif node in self._kept:
                yield self._stage(node), node
        for norm in self._norms:
            for stage in self._sum_stages(norm):
                for operand in images(norm):
                    yield stage, self._of(operand)

    def _part_stage(self, part: Node, cat: Node) -> Stage:
        if part in self._levels:
            return self._stage(part)
        found = space(result(part), self._batch)
        assert found is not None
        return 0, found

    def _sum_stages(self, norm: Node) -> list[Stage]:
        level, where = self._stage(norm)
        return [(level - k, where) for k in ((1,) if is_backward(norm) else (2, 1))]

    def _visit(self, node: Node, stage: Stage) -> None:
        if node not in self._levels or (node in self._kept and stage != self._stage(node)):
            return
        if stage != self._stage(node) and self._cost(node) > _LOADS:
            self._kept.add(node)
            return
        for operand in self._operands(node):
            if packet(node) in RESAMPLING or self._spaces[operand] != stage[1]:
                self._kept.add(operand)
            elif packet(node) is not aten.cat:
                self._visit(operand, stage)

    def _cost(self, node: Node) -> float:
        """Reads of an image that computing the operation anew takes; infinite if it is not to be."""
        kind = packet(node)
        if kind in EXPENSIVE or kind in RESAMPLING or kind is aten.cat:
            return float("inf")
        cost = 0.0
        for operand in node.args if kind in POINTWISE else images(node):
            if isinstance(operand, Node):
                of = self._of(operand)
                anew = of in self._levels and of not in self._kept
                cost += self._cost(of) if anew else result(of).numel() >= result(node).numel()
        return cost

    # The text

    def code(self) -> Code:
        self._places: dict[Node, tuple[str, torch.dtype]] = {}
        self._name_places()
        stages = sorted({stage for stage, _ in self._work()}, key=lambda s: (s[0], s[1].pixels, s[1].channels))
        body = [*self._statistics_from_outside()]
        for level in sorted({level for level, _ in stages}):
            for stage in (s for s in stages if s[0] == level):
                body += self._loop(stage)
            body += ["SYNC", *self._finish(level)]
        scratch, sums = self._scratch, sum(2 * self._spaces[n].channels for n in self._norms)
        count = len(self._inputs)
        text = "\n".join([_HEAD.format(scratch=scratch, sums=sums), *self._pointers(), _SAMPLES, *body, _TAIL])
        position = {node: self._inputs.get(node, -1) for node in self._inputs}
        position |= {node: count + k for k, node in enumerate(self._written)}
        return Code(
            text,
            tuple(memory(result(node)) for node in self._written),
            tuple((position[o], memory(v)) for o, v in zip(self._results, self._result_values, strict=True)),
            scratch,
            sums,
        )

    def _name_places(self) -> None:
        self._scratch = 0
        self._scratch_places: list[str] = []
        for k, node in enumerate(self._written):
            if node in self._spaces:
                size = self._spaces[node].pixels * self._spaces[node].channels
                self._places[node] = f"(out{k} + b * {size})", result(node).dtype
        for node in self._nodes:
            if node in self._kept and node not in self._places:
                self._places[node] = f"(scratch + {self._scratch})", torch.float32
                self._scratch += self._spaces[node].pixels * self._spaces[node].channels

    def _pointers(self) -> Iterator[str]:
        for node, i in self._inputs.items():
            yield f"  const {DTYPES[result(node).dtype]} *__restrict__ in{i} = (const {DTYPES[result(node).dtype]} *)tensors[{i}];"
        for k, node in enumerate(self._written):
            kind = DTYPES[result(node).dtype]
            yield f"  {kind} *__restrict__ out{k} = ({kind} *)tensors[{len(self._inputs) + k}];"

    def _statistics_from_outside(self) -> Iterator[str]:
        """A backward norm's mean and deviation, for each channel."""
        for norm, k in self._norms.items():
            channels = self._spaces[norm].channels
            yield f"    float mean{k}[{channels}], rstd{k}[{channels}], scale{k}[{channels}], shift{k}[{channels}];"
            if not is_backward(norm):
                continue
            groups = int(norm.args[8])  # type: ignore[call-overload]
            for name, source in (("mean", norm.args[2]), ("rstd", norm.args[3])):
                if self._statistics_of(source) is None:
                    source = self._of(source)  # type: ignore[arg-type]
                    value = _load(f"in{self._inputs[source]}", f"b * {groups} + g", result(source).dtype)
                    # two loops: g++ 12 gets one with a division in its index wrong
                    yield f"    if (busy) for (long g = 0; g < {groups}; ++g)"
                    yield f"      for (long i = 0; i < {channels // groups}; ++i) {name}{k}[g * {channels // groups} + i] = {value};"

    def _loop(self, stage: Stage) -> list[str]:
        """All that is computed in a stage, as one loop over pixels and channels."""
        where = stage[1]
        values = _Values(self, stage)
        sums: list[str] = []
        for norm, k in self._norms.items():
            if stage in self._sum_stages(norm):
                sums += self._sum(norm, k, stage, values)
        for node in self._nodes:
            if packet(node) is aten.cat:
                self._store_parts(node, stage, values)
            elif node in self._kept and self._stage(node) == stage:
                place, kind = self._places[node]
                values.lines.append(_store(place, f"p * {where.channels} + c", kind, values.of(node)))
        return [
            "    if (busy) {",
            *(f"      float *__restrict__ {name} = own + {at}; zero({name}, {where.channels});" for name, at in sums),  # type: ignore[misc]
            f"      for (long p = {where.pixels} * part / together; p < {where.pixels} * (part + 1) / together; ++p) {{",
            "        #pragma omp simd",
            f"        for (long c = 0; c < {where.channels}; ++c) {{",
            *(f"          {line}" for line in values.lines),
            "        }",
            "      }",
            "    }",
        ]

    def _store_parts(self, cat: Node, stage: Stage, values: "_Values") -> None:
        place, kind = self._places[cat]
        start = 0
        for part in (self._of(a) for a in images(cat)):
            at = self._part_stage(part, cat)
            if at == stage:
                index = f"p * {self._spaces[cat].channels} + {start} + c"
                values.lines.append(_store(place, index, kind, values.of(part)))
            start += at[1].channels

    def _sum(self, norm: Node, k: int, stage: Stage, values: "_Values") -> list[tuple[str, int]]:
        """Sums over pixels for each channel: names and places of what collects them."""
        offset = sum(2 * self._spaces[n].channels for n, i in self._norms.items() if i < k)
        channels = self._spaces[norm].channels
        if is_backward(norm):
            gradient, normalised = values.gradient(norm)
            values.lines.append(f"sum{k}[c] += {gradient}; product{k}[c] += {gradient} * {normalised};")
            return [(f"sum{k}", offset), (f"product{k}", offset + channels)]
        x = values.of(self._of(images(norm)[0]))
        if stage == self._sum_stages(norm)[0]:
            values.lines.append(f"sum{k}[c] += {x};")
            return [(f"sum{k}", offset)]
        values.lines.append(f"square{k}[c] += ({x} - mean{k}[c]) * ({x} - mean{k}[c]);")
        return [(f"square{k}", offset + channels)]

    def _finish(self, level: int) -> Iterator[str]:
        """Statistics of groups from what was summed in this level."""
        for norm, k in self._norms.items():
            stages = self._sum_stages(norm)
            if level not in (stage[0] for stage in stages):
                continue
            offset = sum(2 * self._spaces[n].channels for n, i in self._norms.items() if i < k)
            where = self._spaces[norm]
            groups = int(norm.args[8] if is_backward(norm) else norm.args[6])  # type: ignore[call-overload]
            shape = f"together, SUMS, {where.channels}, {groups}, {where.pixels}"
            if is_backward(norm):
                yield f"    if (busy) {{ averages(mates + {offset}, {shape}, scale{k});"
                yield f"      averages(mates + {offset + where.channels}, {shape}, shift{k}); }}"
            elif level == stages[0][0]:
                yield f"    if (busy) averages(mates + {offset}, {shape}, mean{k});"
            else:
                yield f"    if (busy) {{ averages(mates + {offset + where.channels}, {shape}, rstd{k});"
                yield f"      for (long c = 0; c < {where.channels}; ++c) {{"
                yield f"        rstd{k}[c] = 1.0f / __builtin_sqrtf(rstd{k}[c] + {_number(norm.args[7])});"
                yield f"        scale{k}[c] = rstd{k}[c]{self._vector(' * ', norm.args[1])};"
                yield f"        shift{k}[c] = {self._vector('', norm.args[2]) or '0.0f'} - mean{k}[c] * scale{k}[c];"
                yield "      }"
                yield from self._statistics_to_outside(norm, k, groups)
                yield "    }"

    def _statistics_to_outside(self, norm: Node, k: int, groups: int) -> Iterator[str]:
        each = self._spaces[norm].channels // groups
        for i, node in enumerate(self._written):
            if node.target is operator.getitem and node.args[0] is norm:
                name = ("", "mean", "rstd")[int(node.args[1])]  # type: ignore[call-overload]
                store = _store(f"out{i}", f"b * {groups} + g", result(node).dtype, f"{name}{k}[g * {each}]")
                yield f"      if (part == 0) for (long g = 0; g < {groups}; ++g) {store}"

    def _vector(self, before: str, node: object) -> str:
        """One number a channel; nothing without any."""
        if not isinstance(node, Node):
            return ""
        return before + _load(f"in{self._inputs[self._of(node)]}", "c", result(node).dtype)


class _Values:
    """Values of operations within one loop; each is computed once."""

    def __init__(self, writer: _Writer, stage: Stage) -> None:
        self.lines: list[str] = []
        self._writer, self._stage = writer, stage
        self._names: dict[Node, str] = {}

    def of(self, node: Node) -> str:
        """A name for the value of an operation, or of an input that is an image of the loop's size."""
        if node not in self._names:
            self._names[node] = self._named(self._expression(node))
        return self._names[node]

    def gradient(self, norm: Node) -> tuple[str, str]:
        """The gradient that a backward norm gets, times its weight, and the normalised values."""
        w, k = self._writer, self._writer._norms[norm]
        grad, x = (self.of(w._of(a)) for a in images(norm))
        mean, rstd = (
            f"{name}{k if within is None else w._norms[within]}[c]"
            for name, within in (("mean", w._statistics_of(norm.args[2])), ("rstd", w._statistics_of(norm.args[3])))
        )
        return f"({grad}{w._vector(' * ', norm.args[4])})", f"(({x} - {mean}) * {rstd})"

    def _named(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"const float {name} = {expression};")
        return name

    def _expression(self, node: Node) -> str:
        w = self._writer
        if node in w._inputs:
            return _load(f"in{w._inputs[node]}", _dense(w._space(node), "b"), result(node).dtype)
        kind = packet(node)
        if node in w._kept and (w._stage(node) != self._stage or kind is aten.cat):
            place, dtype = w._places[node]
            return _load(place, _dense(w._spaces[node]), dtype)
        if kind in RESAMPLING:
            return self._resampled(node)
        if kind in NORMS:
            return self._normalised(node)
        return POINTWISE[kind](*(self._operand(a, node) for a in node.args))

    def _operand(self, operand: object, node: Node) -> str:
        if not isinstance(operand, Node):
            return _number(operand)
        of = self._writer._of(operand)
        if of not in self._writer._inputs:
            return self.of(of)
        batch = self._writer._batch
        named = roles(node.meta["val"], batch)
        assert named is not None
        read = strides(operand.meta["val"], named, batch)
        assert read is not None
        index = f"b * {read.sample} + p * {read.pixel} + c * {read.channel}"
        return _load(f"in{self._writer._inputs[of]}", index, result(of).dtype)

    def _normalised(self, norm: Node) -> str:
        k = self._writer._norms[norm]
        if not is_backward(norm):
            return f"{self.of(self._writer._of(images(norm)[0]))} * scale{k}[c] + shift{k}[c]"
        gradient, normalised = self.gradient(norm)
        within = self._writer._statistics_of(norm.args[3])
        rstd = f"rstd{k if within is None else self._writer._norms[within]}[c]"
        return f"{rstd} * ({gradient} - scale{k}[c] - {normalised} * shift{k}[c])"

    def _resampled(self, node: Node) -> str:
        w, kind = self._writer, packet(node)
        source = w._of(images(node)[0])
        channels, width = w._spaces[node].channels, result(node).shape[3]
        place, dtype = w._places.get(source) or (
            f"(in{w._inputs[source]} + b * {_size(w._space(source))})",
            result(source).dtype,
        )

        def pixel(y: str, x: str, row: int) -> str:
            return _load(place, f"(({y}) * {row} + {x}) * {channels} + c", dtype)

        y, x = f"p / {width}", f"p % {width}"
        if kind is aten.avg_pool2d:
            square = [pixel(f"{y} * 2 + {i}", f"{x} * 2 + {j}", 2 * width) for i in (0, 1) for j in (0, 1)]
            return f"0.25f * ({' + '.join(square)})"
        one = pixel(f"{y} / 2", f"({x}) / 2", width // 2)
        return f"0.25f * {one}" if kind is aten.avg_pool2d_backward else one


def _size(where: Space) -> int:
    return where.pixels * where.channels


def _dense(where: Space, sample: str = "") -> str:
    start = f"{sample} * {_size(where)} + " if sample else ""
    return f"{start}p * {where.channels if where.pixels > 1 else 0} + c"


def _number(value: object) -> str:
    return f"{float(value)!r}f"  # type: ignore[arg-type]


def _load(place: str, index: str, dtype: torch.dtype) -> str:
    return f"{place}[{index}]" if dtype == torch.float32 else f"from_bfloat16({place}[{index}])"


def _store(place: str, index: str, dtype: torch.dtype, value: str) -> str:
    return f"{place}[{index}] = {value if dtype == torch.float32 else f'to_bfloat16({value})'};"


PRELUDE = r"""
#include <stdint.h>
extern "C" int omp_get_thread_num(void), omp_get_num_threads(void);

static inline float exponential(float x) {  // Cephes: within 2 units in the last place; NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
  return y * power.f;
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }
static inline float silu_backward(float grad, float x) {
  const float s = sigmoid(x);
  return grad * s * (1.0f + x * (1.0f - s));
}
static inline float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
static inline float from_bfloat16(uint16_t x) {
  union { uint32_t i; float f; } value = {(uint32_t)x << 16};
  return value.f;
}
static inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  union { float f; uint32_t i; } value = {x};
  return x != x ? 0x7fc0 : (uint16_t)((value.i + 0x7fff + ((value.i >> 16) & 1)) >> 16);
}
static inline void zero(float *sums, long channels) { for (long c = 0; c < channels; ++c) sums[c] = 0.0f; }
static void averages(const float *sums, long mates, long stride, long channels, long groups, long pixels, float *to) {
  const long each = channels / groups;
  for (long g = 0; g < groups; ++g) {
    float total = 0.0f;
    for (long m = 0; m < mates; ++m)
      for (long c = g * each; c < (g + 1) * each; ++c) total += sums[m * stride + c];
    for (long c = g * each; c < (g + 1) * each; ++c) to[c] = total / (float)(pixels * each);
  }
}
"""

_HEAD = """
#define SUMS {sums}L
#define SCRATCH {scratch}L
#define SYNC if (together > 1) {{ _Pragma("omp barrier") }}
extern "C" void region(long samples, long threads, float *workspace, void *const *tensors) {{"""

_SAMPLES = """  #pragma omp parallel num_threads(threads)
  {
    const long count = omp_get_num_threads(), thread = omp_get_thread_num();
    const long together = samples >= count ? 1 : count / samples, crews = count / together;
    const long crew = thread / together, part = thread % together;
    float *own = workspace + threads * SCRATCH + thread * SUMS;
    const float *mates = workspace + threads * SCRATCH + crew * together * SUMS;
    float *__restrict__ scratch = workspace + crew * SCRATCH;
    for (long first = 0; first < samples; first += crews) {
    const long b = first + crew;
    const int busy = crew < crews && b < samples;"""

_TAIL = """    }
  }
}
"""
