"""Helper processes compile into inductor's cache, change nothing but the time, and are missed by nobody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dgfast.runtimes import compiled, precompile
from dgfast.runtimes.precompile import Helpers
from dgfast.runtimes.regions import Region

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def region(scale: float) -> Region:
    return make_fx(lambda x: (torch.sin(x) * scale,))(X), [X]


@pytest.fixture(autouse=True)
def new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and functions of earlier tests forgotten."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_COMPILED_REGIONS", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    yield tmp_path


class Counted:
    """Stands for inductor: counts what this process compiles itself."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, example: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return graph


def test_precompile_a_helper_fills_the_cache(new_cache: Path) -> None:
    with Helpers() as helpers:
        regions = {str(k): region(k + 0.5) for k in range(2)}
        left = helpers.share(regions)
        (process,) = helpers._processes
        helpers.wait(list(regions))
    assert left == ["0"]
    assert process.returncode == 0
    sources = [path.read_text() for path in new_cache.rglob("*.cpp")]
    assert any("1.5" in source for source in sources) and not any("0.5)" in source for source in sources)


def test_precompile_regions_known_to_the_cache_are_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_send", lambda process, regions: pytest.fail("given away"))
    regions = {str(k): region(k) for k in range(6)}
    precompile._Known().add(list(regions))
    with Helpers() as helpers:
        assert helpers.share(regions) == list(regions)
        assert not helpers._processes


def test_precompile_what_a_dead_helper_leaves_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Counted()
    monkeypatch.setattr(torch._inductor, "compile", mine)
    regions = {str(k): region(k) for k in range(5)}
    with Helpers() as helpers:
        (process,) = helpers._processes  # started at once: the cache is new
        process.kill()
        process.wait()
        functions = compiled._compile_regions(helpers, {kind: lambda kind=kind: regions[kind] for kind in regions})
    assert len(mine.graphs) == 5
    for k in range(5):
        torch.testing.assert_close(functions[str(k)](X)[0], X.sin() * k)


def test_precompile_an_error_on_the_way_leaves_no_process_behind() -> None:
    with pytest.raises(KeyError), Helpers() as helpers:
        (process,) = helpers._processes
        raise KeyError("tracing failed")
    assert process.returncode is not None
