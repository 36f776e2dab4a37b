"""The benchmarks themselves, at toy size: what they refuse, what they write, and what happens if a part fails."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import report
from benchmarks.lab import Case, Lab
from benchmarks.measure import relative_error
from benchmarks.subjects import GUIDED_STEP, guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS, flops
from tests.support import warm_python
from tests.support.paths import ROOT

CPU = torch.device("cpu")

# What an issue adds to the registry of runtimes: one that is right, one that is off by a thousandth.
RUNTIMES = """
from benchmarks.runtimes import RUNTIMES
from dgfast.runtimes import Runtime

RUNTIMES["same"] = Runtime("same", lambda function, example: function)
RUNTIMES["off"] = Runtime("off", lambda function, example: lambda *x: tuple(1.001 * y for y in function(*x)))
"""


@pytest.fixture(autouse=True, scope="module")
def no_worker() -> Iterator[None]:
    """In a worker of pytest-xdist, the benchmarks that are started here would take themselves for workers too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
            patch.delenv(name)
        yield


def run_benchmarks(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`pytest benchmarks/` on the toy workload with the runtimes above, and the file that it writes."""
    (folder / "further_runtimes.py").write_text(RUNTIMES)
    path = folder / "results.json"
    words = ["-m", "pytest", "benchmarks/", "-p", "further_runtimes", "-q", "-p", "no:cacheprovider"]
    words += ["--benchmark-only", "--benchmark-json", str(path), "--workload", "tiny", "--seconds", "0", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = warm_python.run(*words, folder=ROOT, variables=environment)
    written = path.read_text() if path.is_file() else ""
    return done, json.loads(written) if written else {}


@dataclass(frozen=True)
class Measured:
    """A run of every group: eager, one more runtime, one that is wrong, and kernels; its result file."""

    done: subprocess.CompletedProcess[str]
    path: Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    runtimes = [word for name in ("eager", "same", "off") for word in ("--runtime", name)]
    done, results = run_benchmarks(folder, *runtimes, "--show-capture", "no")
    return Measured(done, folder / "results.json", results)


# Benchmarks -----------------------------------------------------------------------------------------------------------
def test_benchmarks_say_what_was_measured_beside_the_time(measured: Measured) -> None:
    rows = {row["name"]: row for row in measured.results["benchmarks"]}
    assert {row["group"] for row in rows.values()} == {"guided-step", "kernel", "sampler"}
    for name in ("bench_guided_step[tiny-same]", "bench_sampler[tiny-same]"):
        info, median = rows[name]["extra_info"], rows[name]["stats"]["median"]
        assert info["images_per_second"] == pytest.approx(info["batch"] / median)
        assert info["gflop_per_second"] == pytest.approx(info["gflop_per_image"] * info["images_per_second"])
        assert info["share_of_ceiling"] == pytest.approx(info["gflop_per_second"] / info["ceiling_gflop_per_second"])
        assert info["speedup"] == pytest.approx(info["eager_seconds"] / median)
        assert info["guided_over_unguided"] == pytest.approx(median / info["unguided_seconds"])
        assert 0 <= info["error"] <= info["allowed_error"] and info["compile_seconds"] > 0
    assert rows["bench_kernel[group_norm_silu-eager]"]["extra_info"]["gb_per_second"] > 0
    assert measured.results["machine_info"]["dgfast"]["torch"] == torch.__version__


def test_benchmarks_refuse_to_time_a_wrong_result(measured: Measured) -> None:
    printed = measured.done.stdout
    failed = {line.split("::")[1].split()[0] for line in printed.splitlines() if line.startswith("FAILED ")}
    assert measured.done.returncode == 1 and failed >= {"bench_guided_step[tiny-off]", "bench_unguided_step[tiny-off]"}
    assert all("tiny-off" in name for name in failed), printed
    assert not [row["name"] for row in measured.results["benchmarks"] if "off" in row["name"]]
    assert "off by 1.0e-03 relative to eager in float32, where 2.0e-05 is allowed" in printed


def test_benchmarks_do_not_begin_after_their_time(tmp_path: Path) -> None:
    done, results = run_benchmarks(tmp_path, "--until", "0", "-k", "sampler", "-rs")
    assert "not run: out of time" in done.stdout and not results.get("benchmarks"), done.stdout


def test_benchmarks_below_float32_allow_twice_what_eager_is_off_by() -> None:
    lab = Lab(CPU, seconds=0)
    error, allowed = lab.gate(GUIDED_STEP, Case("tiny", "eager", 2, "bf16"), guided=True)
    assert 1e-3 < error <= allowed == pytest.approx(2 * error, rel=0.5)


def test_benchmarks_count_not_a_number_as_infinitely_wrong() -> None:
    truth = [torch.tensor([1.0, -4.0])]
    assert relative_error([torch.tensor([1.0, torch.nan])], truth) == torch.inf
    assert relative_error([torch.tensor([1.5, -4.0])], truth) == pytest.approx(0.125)


@pytest.mark.parametrize("name", ["tiny", "mnist32"])
def test_benchmarks_of_random_weights_have_a_guidance_that_is_not_zero(name: str) -> None:
    """Saturated logits, or a layer that is zero before training, would make the gradient vanish and cost nothing."""
    workload = WORKLOADS[name]()
    networks = workload.load(CPU, torch.float32)
    for level in guided_levels(workload, networks, CPU):
        arguments = noise_at([level] * 2, networks, range(2), CPU)
        guided, plain = (guided_function(workload, networks, guided, CPU)(*arguments) for guided in (True, False))
        assert (guided[0] - plain[0]).flatten(1).abs().amax(1).min() > 1e-5


def test_benchmarks_count_the_operations_of_a_gradient() -> None:
    """A convolution of 3 x 3 costs 2 x 9 x 4 x 8 operations a pixel, and its input gradient as many again."""
    convolution = torch.nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False)

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(convolution(x).sum(), x)[0]

    assert flops(convolution, torch.ones(1, 4, 5, 5)) == 2 * 9 * 4 * 8 * 25
    assert flops(function, torch.ones(1, 4, 5, 5)) == 2 * (2 * 9 * 4 * 8 * 25)


# Report ---------------------------------------------------------------------------------------------------------------
def test_report_writes_a_table_and_a_plot(measured: Measured, tmp_path: Path) -> None:
    done = CliRunner().invoke(report.main, [str(measured.path), "--out", str(tmp_path / "docs")])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert done.output == table
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    heading = next(line for line in lines if line[0] == "guided-step")
    cells = dict(zip(heading, next(line for line in lines if line[0] == "guided_step tiny-same"), strict=True))
    row = next(r for r in measured.results["benchmarks"] if r["name"] == "bench_guided_step[tiny-same]")
    assert cells["x eager"] == f"{row['extra_info']['speedup']:.2f}"
    assert cells["error"] == f"{row['extra_info']['error']:.1e}"
    assert (tmp_path / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"benchmarks": [{}]}'])
def test_report_names_the_file_that_is_no_result(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    done = CliRunner().invoke(report.main, [str(path)])
    assert done.exit_code == 2 and done.output.startswith(f"Error: {path} is not a result of pytest-benchmark")
    assert len(done.output.splitlines()) == 1


def test_report_of_a_missing_file_or_of_nothing(tmp_path: Path) -> None:
    missing = CliRunner().invoke(report.main, [str(tmp_path / "none.json")])
    assert missing.exit_code == 2 and "none.json' does not exist" in missing.output
    (tmp_path / "empty.json").write_text('{"benchmarks": []}')
    empty = CliRunner().invoke(report.main, [str(tmp_path / "empty.json")])
    assert empty.exit_code == 2 and "no benchmark was timed in" in empty.output
