"""Compiled code kept across runs: found again, made anew where it is damaged, and never another function's."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
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


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that are compiled, in an empty cache folder."""
    monkeypatch.setenv("DGFAST_CACHE_DIR", str(tmp_path / "cache"))
    names: list[str] = []

    def write(graph: GraphModule, example: Sequence[Tensor | None], path: Path) -> None:
        names.append(path.name)
        file.write(graph, example, path)

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

    content = stored.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    stored.write_bytes(damaged)

    def write(graph: GraphModule, example: Sequence[Tensor | None], path: Path) -> None:
        written.append(path.name)
        path.write_bytes(content)  # what it would compile once more

    monkeypatch.setattr(build, "write", write)
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
    shift = torch.ones(1)
    run = RUNTIMES["package"].build(lambda x: (x + shift,), (torch.zeros(2, 1),))
    (result,) = run(torch.ones(2, 1))
    assert result.tolist() == [[2.0], [2.0]] and written == ["function.pt2"]
    assert not cache_folder("packages").exists()


def test_package_runtime_names_a_folder_that_cannot_be_written_to(written: list[str]) -> None:
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
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, so that none is compiled when it is built."""
    functions = [(pure_function.generator(_net(seed)), LATENTS) for seed in (0, 1)]
    RUNTIMES["package"].prepare(functions)  # on two cores or fewer they are left to those who build them
    assert not cache_folder("packages").exists() or (os.cpu_count() or 1) > 3
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    RUNTIMES["package"].prepare(functions)
    assert len([*cache_folder("packages").iterdir()]) == 2
    for function, example in functions:
        run = RUNTIMES["package"].build(function, example)
        torch.testing.assert_close(run(*example), function(*example), rtol=2e-5, atol=2e-5)
    assert written == []
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
