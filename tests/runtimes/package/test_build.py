"""Compiled code kept across runs: found again, made anew where it is damaged, and never another function's."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast import pure_function
from dgfast.errors import UserError
from dgfast.graph import cache
from dgfast.graph.cache_folder import cache_folder
from dgfast.nets.generator import Generator
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.package import build, file

LATENTS = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), None)


@pytest.fixture(scope="session")
def compiled(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """What the runtime keeps of the function of `_net()`."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DGFAST_CACHE_DIR", str(folder))
            RUNTIMES["package"].whole(pure_function.generator(_net()), LATENTS)

    (kept,) = (made_once("generator", make) / "packages").iterdir()
    return kept


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: Path) -> list[str]:
    """Names of the files that are compiled, in an empty cache folder.

    Stand-in for the compiler, which takes ten seconds: of whatever it is given, it hands over `compiled`.
    """
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path / "cache"))
    names: list[str] = []

    def write(graph: GraphModule, example: Sequence[Tensor | None], path: Path) -> None:
        names.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(compiled, path)

    monkeypatch.setattr(build, "write", write)
    return names


def _net(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    return Generator(8, 1, latent_dim=4, style_dim=8, channels=(8, 8)).eval().requires_grad_(False)


def test_package_runtime_keeps_code_and_finds_it_again(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, net = RUNTIMES["package"], _net()
    function = pure_function.generator(net)
    first, second = (runtime.whole(pure_function.generator(copy.deepcopy(net)), LATENTS) for _ in range(2))
    assert len(written) == 1
    (stored,) = cache_folder("packages").iterdir()
    for run in (first, second):
        torch.testing.assert_close(run(*LATENTS), function(*LATENTS), rtol=2e-5, atol=2e-5)

    damaged = bytearray(stored.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    stored.write_bytes(damaged)
    third = runtime.whole(pure_function.generator(net), LATENTS)
    assert len(written) == 2, "damaged code was taken"
    torch.testing.assert_close(third(*LATENTS), function(*LATENTS), rtol=2e-5, atol=2e-5)


def test_package_runtime_compiles_anew_what_differs(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of PyTorch, and other weights: compilers put small ones into the code."""
    monkeypatch.setattr(build, "write", lambda graph, example, path: written.append(path.name))
    monkeypatch.setattr(build, "Package", _Opened)
    for net in (_net(), _net(seed=1)):
        RUNTIMES["package"].build(pure_function.generator(net), LATENTS)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    RUNTIMES["package"].build(pure_function.generator(_net()), LATENTS)
    assert len({*written}) == 3


class _Opened:
    """In place of a package: one whose file is not there."""

    def __init__(self, path: Path, device: torch.device, weights: GraphModule) -> None:
        if not hasattr(_Opened, str(path)):
            setattr(_Opened, str(path), True)
            raise UserError(f"{path} is not there")


def test_package_runtime_keeps_nothing_without_a_name(written: list[str]) -> None:
    function = pure_function.generator(_net())
    run = RUNTIMES["package"].build(lambda *arguments: function(*arguments), LATENTS)
    assert written == ["function.pt2"]
    torch.testing.assert_close(run(*LATENTS), function(*LATENTS), rtol=2e-5, atol=2e-5)
    assert not cache_folder("packages").exists()


def test_package_runtime_names_a_folder_that_cannot_be_written_to(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "write", file.write)
    cache_folder("packages").parent.mkdir()
    cache_folder("packages").write_text("a file")
    with pytest.raises(UserError, match="set DGFAST_CACHE_DIR"):
        RUNTIMES["package"].build(pure_function.generator(_net()), LATENTS)


def test_package_runtime_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in (RUNTIMES["package"].missing(torch.device("cpu")) or "")
    assert shutil.which("g++") is None


def test_graphs_carry_their_names(written: list[str]) -> None:
    named = cache.lowered(pure_function.generator(_net()), LATENTS)
    nameless = cache.lowered(lambda x: (x + 1,), (torch.zeros(2),))
    assert isinstance(named.meta[cache.NAME], str) and nameless.meta[cache.NAME] is None


def test_package_runtime_compiles_several_functions_side_by_side(
    written: list[str], compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, so that none is compiled when it is built, unless its process failed.

    Stand-ins for the processes: the first waits for the second, and leaves what was compiled before.
    """
    popen, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        if started:
            assert started[0].poll() is None and started[0].stdin is not None
            with started[0].stdin as waiting:
                waiting.write(b"\n")
            return popen(["false"], **settings)
        script = 'read -t 20 && cp "$0" "$1/package.pt2"'
        stand_in = ["bash", "-c", script, str(compiled), command[-1]]
        started.append(popen(stand_in, stdin=subprocess.PIPE, **settings))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    functions = [(pure_function.generator(_net(seed)), LATENTS) for seed in (0, 1)]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    RUNTIMES["package"].prepare(functions)  # there are no cores for it
    assert not started and not cache_folder("packages").exists()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    RUNTIMES["package"].prepare(functions)
    (kept,) = cache_folder("packages").iterdir()
    (function, example), failed = functions
    run = RUNTIMES["package"].build(function, example)
    torch.testing.assert_close(run(*example), function(*example), rtol=2e-5, atol=2e-5)
    assert written == []
    RUNTIMES["package"].build(*failed)
    assert len(written) == 1 and written != [kept.name]
    monkeypatch.setattr(build, "compile_all", lambda graphs: pytest.fail("they were there"))
    RUNTIMES["package"].prepare(functions)


def test_package_runtime_ends_its_processes_when_it_is_stopped(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        if started:
            raise KeyboardInterrupt
        assert settings["env"]["TORCHINDUCTOR_COMPILE_THREADS"] == "3"  # as the user has said
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **settings))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    with pytest.raises(KeyboardInterrupt):
        RUNTIMES["package"].prepare([(pure_function.generator(_net(seed)), LATENTS) for seed in (0, 1)])
    assert started[0].returncode == -signal.SIGKILL and not [*cache_folder("packages").iterdir()]
