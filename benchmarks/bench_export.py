"""Exporting the guided denoiser to ONNX: how long it takes, and what comes out.

How fast the file runs is in the groups guided-step and sampler, beside the other runtimes, as runtime `onnx`.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import parametrize_none
from benchmarks.measure import check, relative_error
from benchmarks.workloads import WORKLOADS

_TOLERANCE = 2e-5
_CPU = torch.device("cpu")


@pytest.mark.benchmark(group="export")
def bench_export(benchmark: Any, workload_name: str) -> None:
    """One export of the guided denoiser with an open batch, once; the file is held against eager."""
    from dgfast.export.joint_graph import joint
    from dgfast.runtimes.onnx.file import save
    from dgfast.runtimes.onnx.session import OnnxEngine
    from dgfast.runtimes.onnx.writer import convert, operations

    workload = WORKLOADS[workload_name]()
    subject = joint(workload.load(_CPU, torch.float32), workload.sampling, workload.guidance, "denoiser")
    example = dict(subject.case("example", [1.0, 1.0], seed=0).inputs)
    model = benchmark.pedantic(
        lambda: convert(subject.function, example, subject.outputs, dynamic=True), rounds=1, iterations=1
    )
    counted = operations(model)
    case = subject.amplified("", [0.5, 5.0, 50.0], seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "function.onnx"
        save(model, path)
        found, megabytes = OnnxEngine(path)(case.inputs), path.stat().st_size / 1e6
    error = relative_error([found["denoised"]], [subject(case.inputs)["denoised"]])
    check(f"export {workload_name}", "eager", error, _TOLERANCE)
    benchmark.extra_info |= {
        "nodes": sum(counted.values()), "operations": dict(counted.most_common()), "megabytes": megabytes,
        "error": error, "allowed_error": _TOLERANCE,
    }  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shipped model, or what was asked for: the full-size ones take minutes."""
    option = metafunc.config.getoption
    if "onnx" in (option("runtime") or ["onnx"]):
        metafunc.parametrize("workload_name", option("workload") or ["mnist32"])
    else:
        parametrize_none(metafunc, "workload_name")
