"""Operations that are fused compute what they did one by one, and equal ones are compiled once."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dgfast.runtimes import regions
from dgfast.runtimes.graph import lower, trace
from tests.support.runtimes import Checked, aten

Operation = tuple[str, int, int]
POINTWISE = ("add", "mul", "silu", "sigmoid", "neg", "norm")
SHAPE = (4, 4)


@st.composite
def programs(draw: st.DrawFn) -> list[Operation]:
    """Operations, each on two values made before it: 0 and 1 are the inputs."""
    names = st.sampled_from([*POINTWISE, "transpose", "product", "expensive"])
    return [
        (draw(names), draw(st.integers(0, i + 1)), draw(st.integers(0, i + 1))) for i in range(draw(st.integers(2, 24)))
    ]


def run_program(program: list[Operation], *inputs: Tensor) -> tuple[Tensor, ...]:
    values = list(inputs)
    for name, first, second in program:
        a, b = values[first], values[second]
        match name:
            case "add":
                value = (a + b) / 2
            case "mul":
                value = a * b.sigmoid()
            case "silu":
                value = F.silu(a)
            case "sigmoid":
                value = a.sigmoid()
            case "neg":
                value = -a
            case "norm":
                value = F.group_norm(a[None], 2)[0]
            case "transpose":
                value = a.t()
            case "product":
                value = (a @ b) / 4
            case _:
                value = a.tanh()
        values.append(value)
    return tuple(values[-3:])


@settings(max_examples=40)
@given(program=programs())
def test_runtimes_fused_regions_compute_what_their_operations_did(program: list[Operation]) -> None:
    """In any graph: no region waits for itself, none is left out or run before its inputs are there."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return run_program(program, *inputs)

    generator = torch.Generator().manual_seed(0)
    example, inputs = ([torch.randn(SHAPE, generator=generator) for _ in range(2)] for _ in range(2))
    graph = lower(trace(function, example), example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_WORTHWHILE", 0.0)
        compiler = Checked()
        count = regions.fuse(graph, compiler)
    for found, wanted in zip(graph(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert count == len(compiler.kinds) == len(set(compiler.kinds))
    assert set(compiler.calls) == set(compiler.kinds)


def convolution_blocks(x: Tensor, weights: list[Tensor], step: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    for weight in weights:
        x = step(F.conv2d(x, weight, padding=1))
    return (x,)


def test_runtimes_equal_regions_are_compiled_once() -> None:
    """Equal but for their weights and place; a constant that differs makes another kind."""
    weights = [torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(k)) / 6 for k in range(6)]
    scales = iter([2.0, 2.0, 2.0, 2.0, 3.0, 3.0])
    bias = [torch.randn(4, 1, 1) for _ in weights]
    place = iter(range(6))

    def step(x: Tensor) -> Tensor:
        return F.silu(x + bias[next(place)]) * next(scales) + 1

    x = torch.randn(2, 4, 8, 8)
    traced = trace(lambda x: convolution_blocks(x, weights, step), [x])
    wanted = traced(x + 1)[0]
    graph, compiler = lower(traced, [x]), Checked()
    assert regions.fuse(graph, compiler) == len(compiler.kinds) == 2
    found = graph(x + 1)[0]
    torch.testing.assert_close(found, wanted)
    assert [compiler.calls.count(kind) for kind in compiler.kinds] == [4, 2]
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"].count(aten.silu.default) == 0


def test_runtimes_regions_that_would_save_little_are_left_alone() -> None:
    """Less than a hundredth of what all would save; seen together, though, when there are many of a kind."""

    def function(large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        return F.silu(large) * 2 + 1, F.silu(small) * 3 + 1

    for size, fused in ((10, 1), (10_000, 2)):
        example = [torch.randn(1, 100_000), torch.randn(1, size)]
        graph, compiler = lower(trace(function, example), example), Checked()
        assert regions.fuse(graph, compiler) == fused
        assert [node.target for node in graph.graph.nodes].count(aten.silu.default) == 2 - fused
        torch.testing.assert_close(graph(*example), function(*example))

    def many(large: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
        return F.silu(large) * 2 + 1, *(F.silu(x) * 3 + 1 for x in small)

    example = [torch.randn(1, 100_000), *(torch.randn(1, 10) for _ in range(200))]
    assert regions.fuse(lower(trace(many, example), example), Checked()) == 2


def test_runtimes_nothing_to_fuse_is_nothing_changed() -> None:
    x = torch.randn(4, 4)
    graph = lower(trace(lambda x: (x @ x,), [x]), [x])
    assert regions.fuse(graph, Checked()) == 0
    assert torch.equal(graph(x)[0], x @ x)
