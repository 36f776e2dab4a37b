"""Operations that are fused compute what they did one by one, in any graph and memory layout, and nothing else."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.fusion import regions
from tests.support.runtimes import aten

Operation = tuple[str, int, int]
OPERATIONS = (
    "add",
    "scale",
    "silu",
    "sigmoid",
    "neg",
    "norm",
    "resample",
    "join",
    "modulate",
    "tokens",
    "product",
    "other",
)
BATCH, CHANNELS, SIDE = 2, 8, 4
MIX = torch.randn(CHANNELS, CHANNELS, 1, 1, generator=torch.Generator().manual_seed(0)) / 3
JOIN = torch.randn(CHANNELS, 2 * CHANNELS, 1, 1, generator=torch.Generator().manual_seed(1)) / 4
PARAMETERS = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(2))


def images(seed: int, *shape: int) -> Tensor:
    x = torch.randn(shape or (BATCH, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def fused(function: Callable[..., tuple[Tensor, ...]], *example: Tensor) -> tuple[GraphModule, int]:
    graph = lower(trace(function, example), example, channels_last=True)
    return graph, regions.fuse(graph, len(example[0]))


def left(graph: GraphModule) -> list[object]:
    """What is still done by PyTorch."""
    done = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in done if target is not operator.getitem]


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Fewer cores than samples, as many, and more: then some share a sample."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@st.composite
def programs(draw: st.DrawFn) -> list[Operation]:
    """Operations, each on two values made before it: 0 and 1 are the inputs."""
    names, count = st.sampled_from(OPERATIONS), draw(st.integers(4, 20))
    return [(draw(names), draw(st.integers(0, i + 1)), draw(st.integers(0, i + 1))) for i in range(count)]


def run_program(program: list[Operation], x: Tensor, y: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    """The last values, and the gradient of their sum."""
    with torch.enable_grad():
        values = [x.detach().requires_grad_(), y]
        for name, first, second in program:
            values.append(_step(name, values[first], values[second], vector))
        (gradient,) = torch.autograd.grad(torch.stack([value.sum() for value in values]).sum(), values[0])
    return *(value.detach() for value in values[-2:]), gradient


def _step(name: str, a: Tensor, b: Tensor, vector: Tensor) -> Tensor:
    match name:
        case "add":
            return (a + b) * 0.7
        case "scale":
            return a * b.sigmoid() / 2
        case "silu":
            return F.silu(a)
        case "sigmoid":
            return a.sigmoid()
        case "neg":
            return 1 - a
        case "norm":
            return F.group_norm(a, 2, PARAMETERS[0], PARAMETERS[1])
        case "resample":
            return F.interpolate(F.avg_pool2d(a + b, 2), scale_factor=2)
        case "join":
            return F.conv2d(F.silu(F.group_norm(torch.cat([a, b / 2], 1), 4)), JOIN)
        case "modulate":
            scale, shift = vector.chunk(2, dim=1)
            return F.group_norm(a, 4) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        case "tokens":
            rows = (a * 2).flatten(2).transpose(1, 2)
            return (rows + PARAMETERS[2]).transpose(1, 2).reshape(a.shape) / 2
        case "product":
            return F.conv2d(a, MIX)
        case _:
            return a.tanh()


@settings(max_examples=6)
@given(program=programs())
def test_fusion_of_any_graph_computes_what_its_operations_did(program: list[Operation]) -> None:
    """No region waits for itself, none is left out or run before its inputs are there; gradients included."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return run_program(program, *inputs)

    example, inputs = ((images(k), images(k + 1), images(k + 2, BATCH, 2 * CHANNELS)) for k in (0, 10))
    graph, _ = fused(function, *example)
    for mine, reference in zip(graph(*inputs), function(*inputs), strict=True):
        assert mine.shape == reference.shape
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    assert aten.silu.default not in left(graph) and aten.native_group_norm.default not in left(graph)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_fusion_gives_the_same_however_cores_share_the_work(threads: int, batch: int) -> None:
    """A chain through every kind of stage: sums, resampling, concatenation, statistics for the gradient."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = F.silu(F.group_norm(F.avg_pool2d(F.silu(leaf), 2), 2, PARAMETERS[0]))
            z = torch.cat([F.interpolate(y, scale_factor=2), leaf], 1)
            out = F.silu(F.group_norm(z, 4))
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
        return out.detach(), gradient

    graph, kinds = fused(function, images(0, batch, CHANNELS, 8, 8))
    assert kinds >= 1 and not {aten.silu.default, aten.silu_backward.default, aten.cat.default} & set(left(graph))
    x = images(1, batch, CHANNELS, 8, 8)
    for mine, reference in zip(graph(x), function(x), strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-5, atol=2e-5)


def test_fusion_compiles_equal_regions_once() -> None:
    """Equal but for their weights and place; a constant that differs makes another kind."""
    weights = [torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(k)) / 9 for k in range(6)]
    biases, scales = torch.randn(6, 8, 1, 1, generator=torch.Generator().manual_seed(6)), [2.0, 2.0, 2.0, 2.0, 3.0, 3.0]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        for weight, bias, scale in zip(weights, biases, scales, strict=True):
            x = F.silu(F.conv2d(x, weight, padding=1) + bias) * scale + 1
        return (x,)

    graph, kinds = fused(function, images(0))
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert (kinds, len(calls), left(graph)) == (2, 6, [aten.convolution.default] * 6)
    torch.testing.assert_close(graph(images(3)), function(images(3)), rtol=1e-5, atol=1e-5)  # of six convolutions


def test_fusion_reads_what_is_broadcast_and_what_a_library_laid_out_otherwise() -> None:
    def function(x: Tensor, each: Tensor, row: Tensor, one: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(x * each[:, None, None, None] + row[:, :, None, None]) - one
        return y, (y * 2).flatten(2).transpose(1, 2).reshape(-1, CHANNELS)

    example = images(0), images(1, BATCH), images(2, BATCH, 3 * CHANNELS)[:, CHANNELS : 2 * CHANNELS], torch.tensor(0.3)
    graph, kinds = fused(function, *example)
    assert kinds == 1 and aten.silu.default not in left(graph)
    torch.testing.assert_close(graph(*example), function(*example))
    (call,) = (node for node in graph.graph.nodes if node.op == "call_module")
    region = graph.get_submodule(str(call.target))
    plain = [x if x.dim() < 4 else x.contiguous() for x in example]  # NCHW, where the code expects NHWC
    assert torch.equal(region(*_of_region(call, plain, graph))[0], region(*_of_region(call, example, graph))[0])


def _of_region(call: object, example: tuple[Tensor, ...] | list[Tensor], graph: GraphModule) -> list[Tensor]:
    """The region's inputs for those of the graph."""
    values: list[Tensor] = []

    class Stop(torch.fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> object:
            values.extend(args)
            return super().call_module(target, args, kwargs)

    Stop(graph).run(*example)
    return values


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 8, 3, 5), (4, 8, 4, 4), (2, 8)], ids=str)
def test_fusion_of_odd_shapes_is_right_or_left_alone(shape: tuple[int, ...]) -> None:
    """One channel; sides that nothing halves; more images than the batch inside of the function; vectors."""

    def function(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return F.silu(other) * 2 + x.mean(), F.silu(other.sigmoid()) + 1

    example = images(0), images(1, *shape)
    graph, _ = fused(function, *example)
    torch.testing.assert_close(graph(*example), function(*example))


def test_fusion_leaves_other_types_alone_and_rounds_bfloat16_once() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(F.group_norm(x, 2) * 2 + 1),)

    for dtype, kinds in ((torch.float64, 0), (torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 1)):
        x = images(0).to(dtype)
        graph, kept = fused(function, x)
        assert kept == kinds
        (mine,), (exact,) = graph(x), function(x.double())
        assert mine.dtype == dtype
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-9 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=rounding)


def test_fusion_of_nothing_changes_nothing() -> None:
    x = images(0, 4, 4)
    graph, kinds = fused(lambda x: (x @ x,), x)
    assert kinds == 0 and torch.equal(graph(x)[0], x @ x)


def test_fusion_passes_on_what_is_not_a_number() -> None:
    graph, _ = fused(lambda x: (F.silu(x) + 1,), images(0))
    x = images(0)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, 0, 0] = torch.nan, torch.inf, -1e4
    y = graph(x)[0]
    assert y[0, 0, 0, 0].isnan() and y[0, 1, 0, 0].isinf() and y[0, 2, 0, 0] == 1
    assert int((~y.isfinite()).sum()) == 2
