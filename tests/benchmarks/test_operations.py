"""The ways in which benchmarks/gpu.py runs the operations that have kernels, on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_parts, operations
from benchmarks.part import Setting

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_operations_attention_is_timed_by_every_library_that_has_it() -> None:
    names = {case.name for case in operations.cases(CUDA, small=True) if case.name.startswith("attention-")}
    assert names == {f"attention-{way}" for way in ("eager", "compiled", "triton", "flash", "cudnn")}
    (operation,) = {case.operation for case in operations.cases(CPU, small=True) if case.name == "attention-eager"}
    for way in ("flash", "triton"):  # the CPU has one of that name too, and the kernel's switch
        assert operations.gate(operations.KernelCase(way, operation, way), operations.IMPLEMENTATIONS[way](operation)())


def test_operations_one_that_fails_or_is_wrong_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> list[Tensor]:
        raise RuntimeError("no\nkernel")

    made = operations.IMPLEMENTATIONS | {
        "refused": lambda operation: refused,
        "wrong": lambda operation: lambda: [1.1 * value for value in operations.IMPLEMENTATIONS["eager"](operation)()],
    }
    (operation,) = {case.operation for case in operations.cases(CPU, small=True) if case.name == "attention-eager"}
    cases = [operations.KernelCase(way, operation, way) for way in ("refused", "wrong", "eager")]
    monkeypatch.setattr(operations, "cases", lambda device, small: cases)
    monkeypatch.setattr(operations, "IMPLEMENTATIONS", made)
    asked, refusal, difference, right = gpu_parts.kernels(Setting(CPU, True, tmp_path))
    assert asked is None and refusal == {"kernel": "refused", "failed": "RuntimeError: no kernel"}
    assert difference is not None and "a wrong result is not timed" in str(difference["failed"])
    assert right is not None and right["us"]
