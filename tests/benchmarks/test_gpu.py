"""benchmarks/gpu.py on a CPU: every part at toy size, the processes, and what is on disk when it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity

from benchmarks import engines, gpu, gpu_parts, operations, processes
from benchmarks.gpu_parts import PARTS
from benchmarks.part import Part, Setting
from benchmarks.processes import Running, alone
from benchmarks.runtimes import RUNTIMES
from benchmarks.tables import Row, tables
from dgfast.errors import UserError
from dgfast.runtimes import RUNTIMES as INSTALLED
from dgfast.runtimes import Runtime
from dgfast.runtimes.cuda.streams import split
from tests.support.paths import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker of pytest-xdist, the processes that are started here would take themselves for workers too."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def small(tmp_path: Path) -> Setting:
    return Setting(CPU, True, tmp_path)


def rows_of(part: Callable[..., Iterator[Row | None]], *arguments: Any, **keywords: Any) -> list[dict[str, Any]]:
    """What it yields, having asked for its turn once at most."""
    found = list(part(*arguments, **keywords))
    assert found.count(None) <= 1 and found[-1] is not None
    rows = [dict(row) for row in found if row is not None]
    assert json.loads(json.dumps(rows)) == rows
    return rows


# Parts ----------------------------------------------------------------------------------------------------------------
_LIKE_ANOTHER = {"sampler, 1, bf16", "sampler, 1, tf32", "two streams, larger batches"}
_CHECKED = {"sampler, 512, bf16", "golden networks", "ONNX Runtime", "command line", "package against torch.compile"}


@pytest.mark.parametrize("name", sorted(PARTS.keys() - _CHECKED - _LIKE_ANOTHER))
def test_gpu_part_at_toy_size(name: str, small: Setting) -> None:
    assert rows_of(PARTS[name].run, small)


def test_gpu_sampler_is_timed_with_its_error_and_its_profile(small: Setting) -> None:
    figures, *kernels = rows_of(PARTS["sampler, 512, bf16"].run, small)
    assert 0 < figures["error"] <= figures["allowed"] < 0.1
    assert figures["images/s"] == pytest.approx(2e3 / figures["ms"]) and figures["TFLOP/s"] > 0
    assert all(a["ms"] >= b["ms"] for a, b in pairwise(kernels)) and 0.5 < sum(row["share"] for row in kernels) <= 1
    assert (small.out / "tiny-eager-2-bf16.trace.json.gz").stat().st_size


def test_gpu_golden_networks_are_right_or_said_to_be_wrong(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PARTS["golden networks"].run
    assert [(row["eager"], row["error"]) for row in rows_of(run, small)] == [("ok", 0.0)] * 2
    off = Runtime("eager", lambda function, example: lambda *x: tuple(1.001 * y for y in function(*x)))
    monkeypatch.setitem(RUNTIMES, "eager", off)
    assert [row["eager"] for row in rows_of(run, small)] == ["WRONG"] * 2


def test_gpu_onnx_variants_are_all_right(small: Setting) -> None:
    rows = rows_of(PARTS["ONNX Runtime"].run, small)
    assert {row["ended"] for row in rows} == {"ok"} and len(rows) == 10
    for row in rows:
        assert row["error"] < (1e-2 if row["step"].startswith("fp16") else 2e-5), row
    assert {row["step"] for row in rows if not row["on a GPU"]} == {"eager", "float32", "fp16 without tensor cores"}


def test_gpu_onnx_variant_that_fails_hides_no_other(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, device: Any, *, cuda: Any) -> Any:
        raise RuntimeError("no such\nprovider")

    def files(at: Setting, batch: int, fused: bool, folder: Path) -> Iterator[tuple[str, Path]]:
        return ((dtype, folder / dtype) for dtype in ("float32", "fp16"))

    monkeypatch.setattr(engines, "OnnxEngine", refuse)
    monkeypatch.setattr(engines, "_files", files)  # which nobody opens
    eager, *others = rows_of(PARTS["ONNX Runtime"].run, small)
    assert eager["ended"] == "ok" and {row["ended"] for row in others} == {"RuntimeError: no such provider"}


@pytest.mark.parametrize(("part", "runtime"), [("ONNX Runtime", "onnx"), ("TensorRT", "tensorrt")])
def test_gpu_says_what_is_not_installed(
    part: str, runtime: str, small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(device: torch.device) -> None:
        raise UserError("it is not installed")

    monkeypatch.setitem(INSTALLED, runtime, replace(RUNTIMES[runtime], require=require))
    assert rows_of(PARTS[part].run, small) == [{part: "skipped: it is not installed"}]


def test_gpu_tensorrt_engines_are_compared(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eager in place of the library's engine, and one that does not build."""

    def engine(model: Any, dtype: str, folder: Path, at: Setting) -> Any:
        if dtype == "fp16":
            raise ValueError("does not build")
        return engines._eager(at)

    monkeypatch.setitem(INSTALLED, "tensorrt", Runtime("tensorrt", lambda function, example: function))
    monkeypatch.setattr(engines, "_engine", engine)
    single, half = rows_of(PARTS["TensorRT"].run, small)
    assert (single["ended"], single["error"]) == ("ok", 0.0) and half["ended"] == "ValueError: does not build"


def test_gpu_package_is_compared_with_torch_compile(small: Setting, tmp_path: Path) -> None:
    rows = rows_of(PARTS["package against torch.compile"].run, small)
    assert [(row["guided call"], row["kernels"]) for row in rows] == [("eager", "auto"), ("eager", "triton")] * 2
    assert all(row["ms"] > 0 for row in rows)
    assert {*Setting(CUDA, False, tmp_path).compilers} == {"package", "inductor"} <= RUNTIMES.keys()
    assert all(RUNTIMES[name].capture(CUDA) for name in ("package", "inductor"))  # with no launches of the host


def test_gpu_command_line_tells_what_failed_and_how_far_compiled_is_off(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    def sample(command: Sequence[str], **_: Any) -> Any:
        out = Path(command[command.index("--out") + 1])
        if "--one-step" in command:
            return SimpleNamespace(returncode=3, stderr="...\nError: why\n")
        out.mkdir()
        np.savez(out / "images-0.npz", images=np.full((2, 4, 4, 1), 7 if "--compile" in command else 5, np.uint8))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", sample)
    rows = {row["sample"]: row for row in rows_of(PARTS["command line"].run, small)}
    assert list(rows) == ["eager", "compiled", "one step", "bf16", "compiled again"]
    assert [row["grey levels off eager"] for row in rows.values()] == ["", "2", "", "", "2"]
    assert rows["one step"]["ended"] == "exit code 3: Error: why" and rows["bf16"]["ended"] == "ok"


# What only CUDA reaches, with stand-ins -------------------------------------------------------------------------------
def test_gpu_environment_measures_every_number_format(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "facts", lambda device: {"device": str(device)})
    monkeypatch.setattr(gpu_parts, "matmul_ceiling", lambda device, name, seconds: 1e12)
    rows = rows_of(gpu_parts.environment, replace(small, device=CUDA))
    assert [row["matrix product"] for row in rows[1:]] == ["float32", "tf32", "bf16", "fp16", "default"]


def test_gpu_streams_are_captured_both_ways(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arguments = gpu_parts._guided_call(small, 2, "bf16")
    captured: list[Any] = []

    def capture(way: Any, example: Any) -> Any:
        captured.append(way)
        return way

    monkeypatch.setattr(gpu_parts, "_guided_call", lambda at, batch, name: (function, arguments))
    monkeypatch.setattr(gpu_parts, "capture", capture)
    monkeypatch.setattr(gpu_parts, "by_inductor", lambda graph: graph)
    monkeypatch.setattr(gpu_parts, "concurrent", lambda graph, compile: compile(split(graph)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    (row,) = rows_of(gpu_parts.streams, replace(small, device=CUDA), batches=(1,))
    assert row["difference"] == 0 and len(captured) == 2 and len(list(captured[1].named_children())) > 2


def test_gpu_kernels_are_timed_on_the_device(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.testing

    cases = [case for case in operations.cases(CPU, True) if case.implementation == "eager"]
    monkeypatch.setattr(operations, "cases", lambda device, small: cases)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, return_mode: 2.0)
    assert {row["us"] for row in rows_of(gpu_parts.kernels, replace(small, device=CUDA))} == {2000.0}


def test_gpu_kernel_tests_run_but_those_of_the_compiler_alone(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stdout="FAILED one - why\n1 failed, 2 passed", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    rows = []
    with pytest.raises(SystemExit, match="FAILED one"):
        for row in gpu_parts.kernels_right(replace(small, small=False)):
            rows.append(row)
    files = sorted(Path(command[-1]).name for command in commands)
    said = ["FAILED one - why", "1 failed, 2 passed"]
    assert rows == [{"file": name, "tests": line} for name in files for line in said]
    assert "test_attention.py" in files and "test_aot.py" not in files


def test_gpu_profile_looks_at_the_device(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(key="gemm", count=3, self_device_time_total=2000.0)
    asked: list[Any] = []

    class Profile:
        def __init__(self, activities: list[Any]) -> None:
            asked.extend(activities)

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def export_chrome_trace(self, path: str) -> None:
            Path(path).touch()

        def key_averages(self) -> list[Any]:
            return [event]

    monkeypatch.setattr(gpu_parts, "profile", Profile)
    (row,) = gpu_parts._profile(lambda: [], replace(small, device=CUDA), "name")
    assert row == {"kernel": "gemm", "ms": 2.0, "share": 1.0, "calls": 3}
    assert asked == [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def test_gpu_setting_at_full_size(tmp_path: Path) -> None:
    full = Setting(CPU, False, tmp_path)
    assert (full.workload, full.runtime, full.batch(512), full.rounds(3)) == ("edm-cifar10", "compiled", 512, 3)


# What fits ------------------------------------------------------------------------------------------------------------
def test_gpu_six_minutes_on_16_cores_give_all_but_inductor_and_onnx() -> None:
    names = list(PARTS)
    fits = [part.name for part in gpu.fitting(list(PARTS.values()), 360, 16)]
    assert fits == names[: names.index("kernels against inductor")] and fits[-1] == "two streams against one"
    assert gpu.estimate([PARTS[name] for name in fits], 16) < 360 - processes.GRACE
    assert gpu.fitting(list(PARTS.values()), 1e6, 16) == list(PARTS.values()) and not gpu.fitting(
        list(PARTS.values()), 10, 16
    )
    ten = [part.name for part in gpu.fitting(list(PARTS.values()), 600, 16)]
    assert "ONNX Runtime" in ten


def test_gpu_list_says_what_is_left_out() -> None:
    done = CliRunner().invoke(gpu.main, ["--list", "--minutes", "6", "--cores", "16"])
    lines = {line.split("|")[1].strip(): line for line in done.output.splitlines() if line.startswith("|")}
    assert done.exit_code == 0 and gpu.LEFT_OUT in lines["ONNX Runtime"]
    assert gpu.LEFT_OUT not in lines["two streams against one"]
    assert done.output.splitlines()[-1].startswith("about 3")


def test_gpu_without_one_or_without_a_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(gpu.main, ["--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and done.output.count("\n") == 1 and "no CUDA device here" in done.output
    assert not (tmp_path / "out").exists()
    assert "give --out" in CliRunner().invoke(gpu.main, []).output


# Processes ------------------------------------------------------------------------------------------------------------
PRETEND = """
import json, os, pathlib, sys, time
name = sys.argv[sys.argv.index("--part") + 1]
rows, ready = (pathlib.Path(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--rows", "--ready"))
def say(value):
    with rows.open("a") as file:
        file.write(json.dumps({"row": value}) + chr(10))
say("before")
if name == "crashes":
    print("why", file=sys.stderr, flush=True)
    os.abort()
if name == "never ready":
    time.sleep(600)
ready.touch()
sys.stdin.readline()
say("after")
if name == "hangs":
    time.sleep(600)
with rows.open("a") as file:
    file.write('{"row": "half wri')
"""


def pretended(*names: str, seconds: float, out: Path, measuring: float = 0.0) -> gpu.Run:
    parts = [Part(name, lambda at: iter([]), 0, measuring) for name in names]
    return gpu.Run(parts, [sys.executable, "-c", PRETEND], out, time.time() + seconds)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(("works", "crashes", "never ready", "hangs"), PARTS["environment"]))


@pytest.mark.usefixtures("quick")
def test_gpu_goes_on_after_a_part_that_fails_and_one_that_hangs(tmp_path: Path) -> None:
    run = pretended("crashes", "never ready", "works", "hangs", seconds=6, out=tmp_path, measuring=1.0)
    run.prepare(cores=3)
    assert [process.is_preparing() for process in run.started] == [False] * 4
    run.measure()
    records = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: record["status"] for name, record in records.items()} == {
        "crashes": "failed: exit code -6", "never ready": "stopped: not ready in time", "works": "ok",
        "hangs": "stopped: out of time",
    }  # fmt: skip
    found = {name: [row["row"] for row in record["rows"]] for name, record in records.items()}
    assert found["works"] == found["hangs"] == ["before", "after"] and found["crashes"] == ["before"]
    assert "why" in records["crashes"]["output"] and "output" not in records["works"]
    assert "| works | ok |" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("quick")
def test_gpu_gives_no_turn_while_another_process_measures(tmp_path: Path) -> None:
    run = pretended("works", seconds=3, out=tmp_path)
    run.prepare(cores=1)
    with alone(time.time() + 60) as granted:
        assert granted
        run.measure()
    assert run.started[0].status == "stopped: another process kept the lock"
    assert run.started[0].rows() == [{"row": "before"}]


@pytest.mark.usefixtures("quick")
def test_gpu_names_what_it_had_no_time_to_begin(tmp_path: Path) -> None:
    run = pretended("works", "hangs", seconds=-1, out=tmp_path)
    run.prepare(cores=1)
    run.write({"crashes": {"status": gpu.LEFT_OUT}})
    table = (tmp_path / "table.md").read_text()
    assert "| works | not begun: out of time |" in table and f"| crashes | {gpu.LEFT_OUT} |" in table


def test_gpu_part_ends_when_nobody_is_left_to_give_it_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: ""))
    rows: list[Row | None] = [{"a": 1}, None, {"a": 2}]
    with pytest.raises(SystemExit, match="nobody is left"):
        processes.write_rows(rows, tmp_path / "rows", tmp_path / "ready")
    assert (tmp_path / "rows").read_text() == '{"a": 1}\n' and (tmp_path / "ready").is_file()


def test_gpu_dry_run_as_a_user_starts_it(tmp_path: Path) -> None:
    """By its path, from another folder; two parts, each in a process of its own."""
    parts = ["--part", "environment", "--part", "noise of CUDA"]
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--small", *parts, "--out", "found"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "found/results.json").read_text())["parts"]
    assert {record["status"] for record in records.values()} == {"ok"} and list(records) == parts[1::2]
    table = (tmp_path / "found/table.md").read_text()
    assert "## noise of CUDA (never ran on a GPU before)" in table and "| torch | " in table


def test_gpu_refuses_a_device_that_is_none_before_anything_starts(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.main, ["--device", "nonsense", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "'nonsense' is not cpu, cuda or cuda:1" in result.output
    assert not (tmp_path / "out").exists()


def test_gpu_stopped_in_the_middle_leaves_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path)]
    with subprocess.Popen([*command, "--part", "command line"], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        rows = tmp_path / "command-line.jsonl"
        while not (rows.is_file() and rows.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    record = json.loads((tmp_path / "results.json").read_text())["parts"]["command line"]
    assert record["status"] == "stopped: interrupted" and record["rows"][0]["ended"] == "ok"
    assert "| command line | stopped: interrupted |" in (tmp_path / "table.md").read_text()
    assert not [line for line in commands_running() if str(tmp_path) in line]


def commands_running() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text().replace("\0", " ")
        except OSError:
            continue


def test_tables_begin_anew_where_the_columns_change() -> None:
    rows: list[Row] = [{"a": 1.23456, "b": "x|y"}, {"a": 2.0, "b": "two\nlines"}, {"c": 3}]
    assert tables(rows).split("\n\n") == [
        "| a | b |\n| --- | --- |\n| 1.235 | x\\|y |\n| 2 | two lines |", "| c |\n| --- |\n| 3 |"
    ]  # fmt: skip


def test_gpu_names_of_files_are_those_of_parts(tmp_path: Path) -> None:
    process = Running("sampler, 1, bf16", [sys.executable, "-c", "print('hello')"], tmp_path, os.environ)
    while process.is_preparing():
        time.sleep(0.05)
    assert process.status == "ok" and (tmp_path / "sampler-1-bf16.log").read_text() == "hello\n"
