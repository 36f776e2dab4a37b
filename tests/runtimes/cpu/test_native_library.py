"""Generated code is compiled once a machine, and kept only if it computes what it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.errors import UserError
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.fusion import regions
from dgfast.runtimes.cpu.native import library


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


def function(x: Tensor) -> tuple[Tensor, ...]:
    return (F.silu(x) * 2 + 1,)


def example() -> Tensor:
    return torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)


def fused(monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[Any, int]:
    graph = lower(trace(function, [example()]), [example()], channels_last=True)
    return graph, regions.fuse(graph, 2)


def test_library_compiles_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused()
    (file,) = folder.glob("*.so")
    assert not [path for path in folder.iterdir() if path != file], "the compiler's files are left behind"
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    graph, kinds = fused()
    x = example()
    torch.testing.assert_close(graph(x), function(x))
    assert kinds == 1


def test_library_names_files_by_compiler_and_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused()
    monkeypatch.setattr(library, "_processor", lambda: "another")
    fused()
    assert len(list(folder.glob("*.so"))) == 2


@pytest.mark.parametrize("fault", ["* 2.0f", "+ 1.0f"])
def test_library_keeps_nothing_that_computes_something_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A compiler that errs: the operations stay with PyTorch, and the next run compiles anew."""
    compile_ = library._compile

    def erring(command: str, folder: Path, number: int, text: str) -> Path:
        return compile_(command, folder, number, text.replace(fault, fault[:2] + "1.001f"))

    monkeypatch.setattr(library, "_compile", erring)
    graph, kinds = fused()
    x = example()
    torch.testing.assert_close(graph(x), function(x))
    assert kinds == 0 and not list(folder.glob("*"))


def test_library_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler.*apt install g\+\+.*--compile=try"):
        fused()


def test_library_passes_on_what_the_compiler_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of cheese >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match="broken failed: out of cheese; run without --compile"):
        fused()


def test_library_compiles_anew_what_is_damaged(folder: Path) -> None:
    fused()
    (file,) = folder.glob("*.so")
    library._open.cache_clear()
    file.unlink()  # and not overwritten: this process runs it
    file.write_bytes(b"not a library")
    graph, kinds = fused()
    x = example()
    torch.testing.assert_close(graph(x), function(x))
    assert kinds == 1 and file.stat().st_size > 1000


def test_library_says_where_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Not a directory; set DGFAST_CACHE_DIR to a folder that can be written to"):
        fused()
