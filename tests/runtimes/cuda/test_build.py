"""What is compiled for CUDA, on the CPU: whole or in parts, ahead of time, and by torch.compile where that fails."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.errors import UserError
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.cuda import build
from dgfast.runtimes.cuda.streams import MOST_SAMPLES
from tests.runtimes.cuda.test_streams import Recorder, image, two_networks
from tests.support.pretended_cuda import CUDA, compiled, pretended_cuda


class Compiler:
    """In place of AOTInductor: runs the graph, for arguments of the forms that it was given alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[str] = []
        monkeypatch.setattr(build, "compiled", self.compiled)
        monkeypatch.setattr(build, "has_triton", lambda: True)

    def compiled(self, graph: GraphModule, example: Sequence[Tensor | None], part: str = "") -> Callable[..., Any]:
        self.parts.append(part)
        return compiled(graph, example, part)


def test_cuda_build_compiles_networks_in_parts_of_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    Recorder(monkeypatch)
    run = build.build(two_networks, [image(0)])
    torch.testing.assert_close(run(image(1)), two_networks(image(1)))
    assert len({*compiler.parts}) == len(compiler.parts) == 4


def test_cuda_build_compiles_a_large_batch_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    large = torch.cat([image(seed) for seed in range(MOST_SAMPLES // 2 + 1)])
    run = build.build(two_networks, [large])
    torch.testing.assert_close(run(large + 1), two_networks(large + 1))
    assert compiler.parts == [""]


def test_cuda_build_takes_torch_compile_where_ahead_of_time_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise UserError("AOTInductor failed: no such operation")

    Compiler(monkeypatch)
    Recorder(monkeypatch)
    monkeypatch.setattr(build, "compiled", fails)
    monkeypatch.setattr(torch, "compile", lambda graph, **settings: graph)
    run = build.build(two_networks, [image(0)])
    torch.testing.assert_close(run(image(1)), two_networks(image(1)))
    assert "AOTInductor failed: no such operation; torch.compile takes its place" in capfd.readouterr().err


@pytest.mark.parametrize(("copies", "parts"), [(1, 4), (MOST_SAMPLES // 2 + 1, 1)], ids=["small", "large"])
def test_cuda_build_prepares_what_it_will_ask_for(copies: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pieces under the same names, or it would compile them once more, one after the other."""
    compiler, prepared = Compiler(monkeypatch), list[str]()

    def compile_missing(pieces: Any) -> None:
        for graph, example, part in pieces:
            assert all(x.device == CUDA for x in example)
            compiled(graph, example)(*example)
            prepared.append(part)

    monkeypatch.setattr(build, "compile_missing", compile_missing)
    example = [torch.cat([image(seed) for seed in range(copies)])]
    with pretended_cuda():
        RUNTIMES["compiled"].prepare([])
        RUNTIMES["compiled"].prepare([(two_networks, example)])
        run = RUNTIMES["compiled"].build(two_networks, example)
        torch.testing.assert_close(run(*example), two_networks(*example))
    assert prepared == compiler.parts and len(prepared) == parts


def test_cuda_build_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_triton", lambda: False)
    missing = RUNTIMES["compiled"].missing(torch.device("cuda"))
    assert missing and missing.startswith("--compile on CUDA needs Triton: pip install 'dgfast[triton]'")
    with pytest.raises(UserError, match="needs Triton"):
        build.prepare([(two_networks, [image(0)])])


def test_cuda_build_with_an_inductor_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a broken compiler shows in the first call, and `--compile=try` waits for a user's error."""

    def broken(graph: object, example: object) -> None:
        raise RuntimeError("ptxas died")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **keywords: compile_(graph, backend=broken, **keywords))
    graph = lower(trace(lambda x: (x * 2,), [torch.ones(2)]), [torch.ones(2)])
    with pytest.raises(UserError, match=r"torch.compile failed: .*; run without --compile, or with --compile=try"):
        build.by_inductor(graph)(torch.ones(2))


_ON_CUDA = """
import torch
from dgfast.errors import UserError
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes import RUNTIMES

class OnCuda:  # all that `build` asks of its example before it asks for Triton
    device = torch.device("cuda")

try:
    RUNTIMES["compiled"].build(lambda x: (x,), [OnCuda()])
except UserError as error:
    print(error.message)
"""


def test_cuda_build_asks_for_triton_in_a_fresh_process() -> None:
    """Here other tests have imported what torch itself leaves out; a user's process has not."""
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run([sys.executable, "-c", _ON_CUDA], capture_output=True, text=True, env=without_gpu)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("--compile on CUDA needs Triton")
