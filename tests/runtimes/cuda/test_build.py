"""What is compiled for CUDA, on the CPU: whole or in parts, ahead of time, and by torch.compile where that fails."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.errors import UserError
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.cuda import build
from dgfast.runtimes.cuda.streams import MOST_SAMPLES
from tests.runtimes.cuda.test_streams import Recorder, image, two_networks


class Compiler:
    """In place of AOTInductor: runs the graph, for arguments of the forms that it was given alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[str] = []
        monkeypatch.setattr(build, "compiled", self.compiled)
        monkeypatch.setattr(build, "has_triton", lambda: True)

    def compiled(
        self, graph: GraphModule, example: Sequence[Tensor | None], part: str = ""
    ) -> Callable[..., tuple[Tensor, ...]]:
        self.parts.append(part)
        forms = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in example]

        def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            assert [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in arguments] == forms
            results = graph(*arguments)
            return (results,) if isinstance(results, Tensor) else tuple(results)

        return run


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


def test_cuda_build_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_triton", lambda: False)
    missing = RUNTIMES["compiled"].missing(torch.device("cuda"))
    assert missing and missing.startswith("--compile on CUDA needs Triton: pip install 'dgfast[triton]'")
