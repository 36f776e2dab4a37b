"""Generated code is compiled once a machine, and kept only if it computes what it should."""

import ctypes
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


@pytest.mark.parametrize(
    "said", ["failed to map segment from shared object", "libgomp.so.1: cannot open shared object"]
)
def test_library_says_what_does_not_load(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """A folder in which nothing may be executed, OpenMP's library missing: it is not that nothing can be written."""

    def refuse(path: str) -> None:
        raise OSError(said)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(
        UserError, match=f"what was compiled does not load: {said}; install .*libgomp1.*DGFAST_CACHE_DIR"
    ) as error:
        fused()
    assert "can be written to" not in error.value.message and "\n" not in error.value.message


def test_library_refuses_a_compiled_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's own words."""
    path = tmp_path / "compiler"
    path.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(UserError, match=r"does not load: .*: file too short"):
        fused()


def test_library_says_which_compiler_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(bytes(99))
    (tmp_path / "data").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "data"))
    with pytest.raises(UserError, match="data does not start: Exec format error; set CXX to another"):
        fused()
