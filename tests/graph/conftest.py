"""A cache of graphs of a test's own, what was traced, and networks to trace."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.fx import GraphModule

from dgfast.graph import cache as graph_cache
from dgfast.graph.trace import trace
from tests.support.graphs import Nets


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path))
    return tmp_path / "graphs"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a trace."""
    calls: list[int] = []

    def counted(*arguments: Any) -> GraphModule:
        calls.append(1)
        return trace(*arguments)

    monkeypatch.setattr(graph_cache, "trace", counted)
    return calls


@pytest.fixture(scope="module")
def masters(tiny_net: Callable[..., Any], tiny_discriminator: Callable[..., Any]) -> Nets:
    return {"net": tiny_net(3), "discriminator": tiny_discriminator(3)}


@pytest.fixture
def tiny(masters: Nets) -> Nets:
    """Networks that a test may change."""
    return copy.deepcopy(masters)
