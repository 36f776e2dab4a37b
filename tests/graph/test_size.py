"""How much there is to compile: a graph that grows, or blocks that no longer share their code, show without a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.fusion import regions
from dgfast.runtimes.cpu.native import library

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("workload", "guided", "nodes", "kernels"),
    [("tiny", True, 608, 29), ("mnist32", True, 1165, 67), ("mnist32", False, 371, 25)],
)
def test_graph_has_no_more_to_compile_than_it_had(
    workload: str, guided: bool, nodes: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels: different pieces of code between convolutions, products and attention, as the CPU's fusion cuts."""
    texts: list[str] = []

    def load(different: Sequence[str], proves: Callable[[str, Any], bool]) -> dict[str, Any]:
        texts.extend(different)
        return {}

    monkeypatch.setattr(library, "load", load)
    chosen = WORKLOADS[workload]()
    networks = chosen.load(CPU, torch.float32)
    arguments = noise_at([guided_levels(chosen, networks, CPU)[0]] * 2, networks, range(2), CPU)
    function = guided_function(chosen, networks, guided, CPU)
    graph = lower(trace(function, arguments), arguments, channels_last=True)
    operations = sum(node.op == "call_function" for node in graph.graph.nodes)
    regions.fuse(graph, 2)
    assert operations <= nodes and len({*texts}) <= kernels
