"""Graphs kept across runs: a hit is the graph that would have been traced, and nothing else is a hit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import ops, pure_function
from dgfast.graph import Function
from dgfast.graph import cache as graph_cache
from dgfast.graph import key as graph_key
from dgfast.graph.trace import trace
from dgfast.guidance import guided_denoiser
from dgfast.nets.generator import Generator
from dgfast.runtimes.cpu import build as cpu
from dgfast.runtimes.cpu.fusion import regions
from tests.support.graphs import Nets, example, guided, key

LATENTS = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), None)
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def small() -> Function:
    """A function that is traced in no time."""
    generator = Generator(8, 1, latent_dim=4, style_dim=8, channels=(8, 8)).eval().requires_grad_(False)
    return pure_function.generator(generator)


# Hits -----------------------------------------------------------------------------------------------------------------
def test_graph_cache_hit_is_the_graph_that_was_traced(tiny: Nets, traced: list[int]) -> None:
    """Operation by operation and bit for bit; it reads the networks of the hit, for others may have changed since."""
    twin = copy.deepcopy(tiny)
    first = graph_cache.lowered(guided(tiny), example())
    x, sigma, labels = example()
    inputs = 3 * x.flip(-1), sigma.flip(0), labels.flip(0)
    outputs = first(*inputs)
    for parameter in (*tiny["net"].parameters(), *tiny["discriminator"].parameters()):
        parameter.zero_()
    second = graph_cache.lowered(guided(twin), example())
    assert len(traced) == 1, "the second was traced"
    assert all(map(torch.equal, second(*inputs), outputs))
    for node, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        assert (node.name, node.op) == (other.name, other.op)
        assert node.op == "get_attr" or node.target == other.target
        assert repr((node.args, node.kwargs)) == repr((other.args, other.kwargs))
        assert _forms(node.meta.get("val")) == _forms(other.meta.get("val"))


def _forms(value: Any) -> Any:
    """How a result lies in memory: what fusing asks of a graph."""
    if isinstance(value, list | tuple):
        return list(map(_forms, value))
    return value if value is None else (value.shape, value.stride(), value.dtype)


def test_graph_cache_serves_compiled_functions(
    small: Function, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "fuse", lambda *_: 0)  # takes seconds, and has tests of its own
    cold, warm = (cpu.build(small, LATENTS) for _ in range(2))
    assert len(traced) == 1
    assert all(map(torch.equal, cold(*LATENTS), warm(*LATENTS)))


class _Mine(nn.Module):
    """A user's own network, whose code no key can know."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x / 2


def test_graph_cache_traces_what_has_no_name(traced: list[int], folder: Path) -> None:
    function = guided_denoiser(_Mine(), [])
    for _ in range(2):
        graph_cache.lowered(function, example())
    assert len(traced) == 2 and not folder.exists()


# Files ----------------------------------------------------------------------------------------------------------------
def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _altered(text: str) -> str:
    """Valid JSON still, and another function."""
    changed = text.replace('"aten.add.Tensor"', '"aten.sub.Tensor"')
    assert changed != text
    return changed


@pytest.mark.parametrize("damage", [_cut, _altered, lambda text: "", lambda text: text.replace("\n", "")])
def test_graph_cache_traces_anew_what_is_damaged(
    small: Function, traced: list[int], folder: Path, damage: Callable[[str], str]
) -> None:
    outputs = graph_cache.lowered(small, LATENTS)(*LATENTS)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage(whole))
    assert all(map(torch.equal, graph_cache.lowered(small, LATENTS)(*LATENTS), outputs))
    assert len(traced) == 2 and path.read_text() == whole


def test_graph_cache_reads_no_file_under_another_name(small: Function, folder: Path, traced: list[int]) -> None:
    graph_cache.lowered(small, LATENTS)
    (path,) = folder.iterdir()
    larger = (torch.cat([LATENTS[0]] * 2), None)
    path.rename(folder / f"{key(small, larger)}.json")
    graph_cache.lowered(small, larger)
    assert len(traced) == 2


def test_graph_cache_calls_nothing_but_operations_of_torch_and_dgfast() -> None:
    for name in (
        "aten.add",
        "aten.__class__.mro",
        "debugprims.delete_tensor.default",
        "os.system.default",
        "dgfast.gate.default",
    ):
        with pytest.raises((ValueError, AttributeError, ImportError)):
            graph_cache._operation(name)


def test_graph_cache_keeps_calls_of_kernels(
    tiny: Nets, traced: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # or they leave tensors on the CPU alone
    with ops.kernels("triton"):
        first, second = (graph_cache.lowered(guided(tiny), example()) for _ in range(2))
    graph_cache.lowered(guided(tiny), example())
    assert len(traced) == len([*folder.iterdir()]) == 2
    called = [
        [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in (first, second)
    ]
    assert called[0] == called[1] and "dgfast.group_norm_silu_backward.default" in called[0]


def test_graph_cache_keeps_constants_and_infinite_numbers(folder: Path) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.clamp(-torch.inf, 0.1) + torch.tensor([1.0, torch.nan]), x.bfloat16() * torch.tensor(3)

    x = torch.arange(6.0).view(3, 2)
    graph = trace(function, (x,))
    encoded = graph_cache._encoded(graph, [])
    for mine, reference in zip(graph_cache._decoded(encoded, [])(x), function(x), strict=True):
        assert mine.dtype == reference.dtype and torch.equal(mine.nan_to_num(), reference.nan_to_num())
    weights = torch.zeros(1 << 21)
    large = trace(lambda x: (x + weights,), (torch.zeros(1),))
    with pytest.raises(graph_key.NamelessError, match="constants"):
        graph_cache._encoded(large, [])


def test_graph_cache_lives_without_a_folder(small: Function, folder: Path, traced: list[int]) -> None:
    folder.write_text("a file stands where the folder should be")
    for _ in range(2):
        graph_cache.lowered(small, LATENTS)
    assert len(traced) == 2
