"""Winograd's convolutions are convolutions, whatever the size, the cores and the processor's registers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.native import library, sources, winograd
from dgfast.runtimes.cpu.native.sources import lanes, source

_MOST = {"MOST_CHANNELS": winograd._MOST_CHANNELS}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def compiled() -> object:
    text = source("winograd", **_MOST)
    return library.load([text], lambda *_: True)[text]


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def largest_error(weight: Tensor, bias: Tensor | None, x: Tensor) -> float:
    """Of the compiled function against float64, relative to the largest value."""
    reference = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    mine = winograd.Winograd(compiled(), weight, x.shape)(x, bias)
    assert mine.dtype == torch.float32 and mine.is_contiguous(memory_format=torch.channels_last)
    return float((mine - reference).abs().max() / reference.abs().max())


@settings(max_examples=30)
@given(
    samples=st.integers(1, 4), channels=st.integers(1, 3), filters=st.integers(1, 5), height=st.integers(1, 13),
    width=st.integers(1, 13), biased=st.booleans(), channels_last=st.booleans(),
)  # fmt: skip
def test_winograd_equals_float64_at_any_size(
    samples: int, channels: int, filters: int, height: int, width: int, biased: bool, channels_last: bool
) -> None:
    weight, x = (
        draw(filters * lanes(), channels * lanes(), 3, 3),
        draw(samples, channels * lanes(), height, width, seed=1),
    )
    bias = draw(filters * lanes(), seed=2) if biased else None
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert largest_error(weight, bias, x.contiguous(memory_format=layout)) < 1e-5


@pytest.mark.parametrize("own, shared", [(1, 1), (1, 10**9), (10**9, 1), (200_000, 1)])
def test_winograd_gives_the_same_however_cores_share_the_tiles(
    monkeypatch: pytest.MonkeyPatch, threads: int, own: int, shared: int
) -> None:
    """One tile at a time or all at once, by every core for itself or by all together."""
    monkeypatch.setattr(winograd, "_OWN_BYTES", own)
    monkeypatch.setattr(winograd, "_SHARED_BYTES", shared)
    weight, x = draw(3 * lanes(), 2 * lanes(), 3, 3), draw(3, 2 * lanes(), 10, 7, seed=1)
    assert largest_error(weight, draw(3 * lanes(), seed=2), x) < 1e-5


@pytest.mark.parametrize("register", [4, 8, 16])
def test_winograd_for_any_processor(monkeypatch: pytest.MonkeyPatch, register: int) -> None:
    for module in (winograd, sources):
        monkeypatch.setattr(module, "lanes", lambda: register)
    assert largest_error(draw(48, 32, 3, 3), None, draw(2, 32, 9, 8, seed=1)) < 1e-5


def test_winograd_points_are_exact() -> None:
    """In float64 the transforms give the convolution itself: interpolation, not approximation."""
    one = torch.tensor([*map(winograd._kernel_at, range(5)), [0.0, 0.0, 1.0]], dtype=torch.float64)
    points = torch.tensor(winograd._POINTS, dtype=torch.float64)
    kernel, line = torch.randn(3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    # Toom and Cook: what is evaluated at the points, transposed.
    evaluated = torch.cat([points[:, None] ** torch.arange(4), torch.tensor([[0.0, 0.0, 0.0, 1.0]])]).double()
    lagrange = torch.linalg.inv(torch.cat([points[:, None] ** torch.arange(6), torch.eye(6)[5:].double()]))
    distances = [torch.prod(points[i] - points[torch.arange(5) != i]) for i in range(5)]
    data = lagrange @ torch.diag(torch.stack([*distances, torch.ones((), dtype=torch.float64)]))
    convolved = evaluated.T @ ((one @ kernel) * (data.T @ line))
    torch.testing.assert_close(convolved, line.unfold(0, 3, 1) @ kernel)


def test_winograd_replaces_what_it_may_and_nothing_else() -> None:
    """Stride 1, padding 1, whole registers of channels, enough of them and of pixels, constant weights of float32."""
    wide, deep = 4 * lanes(), 8 * lanes()
    plain, odd, thin = draw(deep, wide, 3, 3) / 20, draw(lanes() + 1, wide, 3, 3), draw(lanes() // 2, wide, 3, 3)
    one, bias = draw(deep, wide, 1, 1), draw(deep, seed=4)

    def function(x: Tensor, small: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        left = (
            F.conv2d(x, plain, stride=2, padding=1), F.conv2d(x, plain), F.conv2d(x, plain, padding=2, dilation=2),
            F.conv2d(x, odd, padding=1), F.conv2d(x, thin, padding=1), F.conv2d(x, one), F.conv2d(x, weight, padding=1),
            F.conv2d(small, plain, padding=1), F.conv2d(x.double(), plain.double(), padding=1),
        )  # fmt: skip
        return F.conv2d(x, plain, bias, padding=1), *left

    def inputs(seed: int) -> list[Tensor]:
        return [draw(4, wide, 16, 16, seed=seed), draw(1, wide, 15, 15, seed=seed), plain]

    graph = lower(trace(function, inputs(0)), inputs(0), channels_last=True)
    convolutions = sum(n.target is torch.ops.aten.convolution.default for n in graph.graph.nodes)
    winograd.replace(graph)
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    left = sum(n.target is torch.ops.aten.convolution.default for n in graph.graph.nodes)
    assert (len(calls), left) == (1, convolutions - 1) == (1, 9)
    for mine, reference in zip(graph(*inputs(1)), function(*inputs(1)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_winograd_is_not_used_where_its_code_errs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that errs, on a machine that has compiled nothing yet: the convolution stays with PyTorch."""
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path))
    compile_ = library._compile

    def erring(command: str, folder: Path, number: int, text: str) -> Path:
        return compile_(command, folder, number, text.replace("y[j] + shift", "y[j]"))

    monkeypatch.setattr(library, "_compile", erring)
    weight, bias = draw(4 * lanes(), 4 * lanes(), 3, 3), draw(4 * lanes(), seed=1)
    example = [draw(2, 4 * lanes(), 16, 16)]
    graph = lower(trace(lambda x: (F.conv2d(x, weight, bias, padding=1),), example), example, channels_last=True)
    winograd.replace(graph)
    assert not [n for n in graph.graph.nodes if n.op == "call_module"]
