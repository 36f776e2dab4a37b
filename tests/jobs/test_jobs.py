"""Jobs from the command line: they go on, keep to a time limit, say what they will take, and lose nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dgfast.bundle import Bundle
from dgfast.image_folder import read_images
from dgfast.one_step import OneStep
from dgfast.outputs import to_uint8
from dgfast.sample import main
from dgfast.sampler import Sampler
from dgfast.stepping import Stepping
from dgfast.stopping import Terminated
from tests.faults import contents


def _run(bundle: Bundle, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle.folder), "--seeds", "0-9", "--batch", "4", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *options])


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert _run(small_bundle, out).exit_code == 0
    return out


def _stopping(monkeypatch: pytest.MonkeyPatch, after: int, how: Callable[[], Any]) -> None:
    """Let `how` happen in the place of the batch after so many."""
    call, calls = Sampler.__call__, []

    def stopped(self: Sampler, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == after + 1:
            how()
        return call(self, *arguments)

    monkeypatch.setattr(Sampler, "__call__", stopped)


def _raise(error: BaseException) -> None:
    raise error


# Going on -------------------------------------------------------------------------------------------------------------
def test_the_same_command_again_draws_nothing_twice(small_bundle: Bundle, undisturbed: Path) -> None:
    before = contents(undisturbed)
    result = _run(small_bundle, undisturbed)
    assert result.exit_code == 0 and "has all 10 images already" in result.output
    assert contents(undisturbed) == before and len(_manifest(undisturbed)["runs"]) >= 2


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_job_says_what_is_safe_and_goes_on(
    small_bundle: Bundle, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any, code: int
) -> None:
    with monkeypatch.context() as patch:
        _stopping(patch, 2, lambda: _raise(stop))
        result = _run(small_bundle, tmp_path / "out")
    assert result.exit_code == code
    (line,) = [line for line in result.output.splitlines() if line.startswith("stopped: ")]
    assert line.endswith(f"8 of 10 images are safe in {tmp_path / 'out'}/ (seeds 0-7); the same command goes on")
    assert _manifest(tmp_path / "out")["runs"][0]["outcome"] == "interrupted"
    result = _run(small_bundle, tmp_path / "out")
    assert result.exit_code == 0 and "has 8 of 10 images already; drawing 2" in result.output
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_ctrl_c_before_anything_is_one_line(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgfast.bundle.read", lambda _: _raise(KeyboardInterrupt()))
    result = _run(small_bundle, tmp_path / "out")
    assert result.exit_code == 130 and result.output.splitlines() == ["stopped before anything was drawn"]
    assert not (tmp_path / "out").exists()


def test_an_error_half_way_says_what_is_safe(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, calls = Stepping.function, []

    def broken(self: Stepping, *arguments: Any) -> Any:
        calls.append(1)
        made = function(self, *arguments)
        return (lambda *x: tuple(y * torch.nan for y in made(*x))) if len(calls) > 7 else made

    monkeypatch.setattr(Stepping, "function", broken)
    result = _run(small_bundle, tmp_path / "out")
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and "became NaN or infinite at step 0" in line
    assert "4 of 10 images are safe" in line and "(seeds 0-3)" in line


def test_a_bug_half_way_says_what_is_safe(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopping(monkeypatch, 1, lambda: _raise(ZeroDivisionError("a bug")))
    result = _run(small_bundle, tmp_path / "out")
    assert isinstance(result.exception, ZeroDivisionError) and "4 of 10 images are safe" in result.output
    assert "a bug" in _manifest(tmp_path / "out")["runs"][0]["outcome"]


def test_another_job_in_the_folder_is_refused(small_bundle: Bundle, undisturbed: Path) -> None:
    before = contents(undisturbed)
    for options, differing in (
        (["--steps", "5"], "--steps 4 there, 5 here"), (["--seeds", "0-10"], "--seeds 0-9 there, 0-10 here"),
        (["--labels", "1"], "--labels none there, 1 here"), (["--dtype", "bf16"], "--dtype float32 there, bf16 here"),
        (["--noise", "cuda"], "--noise none there, cuda here"),
        (["--batch", "5"], "--batch 4 there, 5 here"), (["--format", "npz"], "--format grid,npz there, npz here"),
    ):  # fmt: skip
        result = _run(small_bundle, undisturbed, *options)
        assert result.exit_code == 2 and f"holds another job: {differing}" in result.output
    assert contents(undisturbed) == before


def test_other_weights_are_another_job(small_bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(small_bundle.folder, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle", "small", {})
    assert _run(bundle, tmp_path / "out").exit_code == 0
    tensors = load_file(tmp_path / "bundle" / "generator.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "bundle" / "generator.safetensors")
    assert "has all 10 images already" in _run(bundle, tmp_path / "out").output  # a network that the job does not use
    tensors = load_file(tmp_path / "bundle" / "score.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "bundle" / "score.safetensors")
    result = _run(bundle, tmp_path / "out")
    assert result.exit_code == 2 and "holds another job: weights" in result.output


def test_overwrite_draws_the_new_job(small_bundle: Bundle, tmp_path: Path) -> None:
    assert _run(small_bundle, tmp_path / "out").exit_code == 0
    assert _run(small_bundle, tmp_path / "out", "--seeds", "5-6", "--overwrite").exit_code == 0
    assert len(read_images(tmp_path / "out")[0]) == 2 and _manifest(tmp_path / "out")["job"]["seeds"] == "5-6"


# Time -----------------------------------------------------------------------------------------------------------------
def test_a_time_limit_stops_at_a_shard_and_the_job_goes_on(
    small_bundle: Bundle, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: clock[0])
        call = Sampler.__call__

        def slow(self: Sampler, *arguments: Any) -> torch.Tensor:
            clock[0] += 60.0
            return call(self, *arguments)

        patch.setattr(Sampler, "__call__", slow)
        result = _run(small_bundle, tmp_path / "out", "--time-limit", "2.5m")
    assert result.exit_code == 3, result.output
    assert "--time-limit: 8 of 10 images are safe" in result.output
    assert _manifest(tmp_path / "out")["complete"] is False
    assert _run(small_bundle, tmp_path / "out", "--time-limit", "1h").exit_code == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


@pytest.mark.parametrize("text", ["0s", "-1m", "5", "x", "", "nanh", "infs", "1d"])
def test_a_time_limit_that_is_none_is_refused(small_bundle: Bundle, tmp_path: Path, text: str) -> None:
    result = _run(small_bundle, tmp_path / "out", "--time-limit", text)
    assert result.exit_code == 2 and "expected a time such as 90s, 30m or 2.5h" in result.output


@pytest.mark.parametrize("how", [[], ["--one-step"]], ids=["sampler", "one step"])
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    for kind in (Sampler, OneStep):
        monkeypatch.setattr(kind, "estimate", lambda self, batch: 3.0 * batch)  # a second a batch of four
    seeds = ["--seeds", "0-99999", "--format", "adm", "--format", "latents"]
    result = _run(small_bundle, tmp_path / "out", "--dry-run", *how, *seeds[:2])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert lines["images"] == "100,000; 25,000 chunks of 4 to draw"
    assert lines["calls"] == (
        "one generator forward an image" if how else "7 score evaluations and 0 guidance gradients an image"
    )
    assert lines["time"] == "about 83.3 h on cpu, eager" and lines["disk"].startswith("at most 35.2 MB in")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_runtime_that_it_did_not_time(small_bundle: Bundle, tmp_path: Path) -> None:
    printed = _run(small_bundle, tmp_path / "out", "--dry-run", "--compile").output
    assert "on cpu, as eager has it; compiled was not timed" in printed


def test_a_dry_run_counts_what_is_there(small_bundle: Bundle, undisturbed: Path) -> None:
    before = contents(undisturbed)
    result = _run(small_bundle, undisturbed, "--dry-run")
    assert "images  10, 10 of them there already; 0 chunks of 4 to draw" in result.output
    assert contents(undisturbed) == before
    assert "holds another job" in _run(small_bundle, undisturbed, "--dry-run", "--steps", "5").output
    anew = _run(small_bundle, undisturbed, "--dry-run", "--steps", "5", "--overwrite").output
    assert "images  10; 3 chunks of 4 to draw" in anew


@pytest.mark.parametrize("formats", [["npz", "grid"], ["png", "adm", "grid"], ["adm"]], ids=" ".join)
def test_a_dry_runs_disk_is_enough(small_bundle: Bundle, tmp_path: Path, formats: list[str]) -> None:
    how = [part for name in formats for part in ("--format", name)]
    text = re.search(r"at most ([\d.]+) KB", _run(small_bundle, tmp_path / "out", "--dry-run", *how).output)
    assert text is not None and _run(small_bundle, tmp_path / "out", *how).exit_code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written / 1e3 <= float(text[1])


def test_estimates_time_every_call_of_the_plan(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import dgfast

    calls: list[int] = []

    def two_seconds(call: Callable[[], Any], device: Any) -> float:
        calls.append(len(call()[0]))
        return 2.0

    monkeypatch.setattr("dgfast.sampler.seconds_of", two_seconds)
    sampler = dgfast.Sampler(dgfast.load(small_bundle), dgfast.SamplingConfig(num_steps=4))
    assert sampler.estimate(3) == 14.0 and calls == [3]  # seven calls of one function
    monkeypatch.setattr("dgfast.one_step.seconds_of", lambda call, device: float(len(call())))
    assert dgfast.OneStep.load(small_bundle).estimate(3) == 3.0


# Formats --------------------------------------------------------------------------------------------------------------
def test_every_format_keeps_every_image(small_bundle: Bundle, undisturbed: Path, tmp_path: Path) -> None:
    images, labels = read_images(undisturbed)
    for name in ("png", "adm"):
        result = _run(small_bundle, tmp_path / name, "--format", name)
        assert result.exit_code == 0, result.output
        drawn, classes = read_images(tmp_path / name)
        assert np.array_equal(drawn[..., :1], images) and classes.tolist() == labels.tolist()
        assert f"{tmp_path / name}/" in result.output and "all images" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "grid"], "shows the first images and keeps none"),
        (["--format", "latents"], "makes images, there are no latents"),
        (["--format", "png", "--seeds", "3,0-5"], "seed 3 stands twice"),
        (["--seeds", str(2**32)], "4294967296: seeds go up to 4294967295"),
        (["--seeds", str(2**63)], "seeds go up to 4294967295"), (["--seeds", f"0-{2**32}"], "seeds go up to"),
        (["--seeds", "0-9999999999"], "seeds go up to"), (["--seeds", "-1"], "expected integers and ranges"),
        (["--seeds", "1.5"], "expected integers and ranges"), (["--labels", "0-9999999999"], "is out of range"),
        (["--seeds", "@/dev/zero"], "/dev/zero: longer than 16,777,216 characters"),
        (["--steps", "20000"], "num_steps (--steps) 20000"),
        (["--seeds", "@nowhere"], "nowhere: can't be read (No such file or directory)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_jobs_are_refused_before_anything_is_written(
    small_bundle: Bundle, tmp_path: Path, options: list[str], message: str
) -> None:
    result = _run(small_bundle, tmp_path / "out", *options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output
    assert not (tmp_path / "out").exists()


def test_seeds_and_labels_come_from_files_too(small_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("7\n3-4\n")
    (tmp_path / "labels.txt").write_text("2 0\n1")
    files = ["--seeds", f"@{tmp_path / 'seeds.txt'}", "--labels", f"@{tmp_path / 'labels.txt'}"]
    assert _run(small_bundle, tmp_path / "out", *files).exit_code == 0
    with np.load(tmp_path / "out" / "images-00000.npz") as shard:
        assert shard["seeds"].tolist() == [7, 3, 4] and shard["labels"].tolist() == [2, 0, 1]
    for content in (b"\xff\xfe", b"", b"x"):
        (tmp_path / "seeds.txt").write_bytes(content)
        result = _run(small_bundle, tmp_path / "other", *files)
        assert result.exit_code == 2 and "seeds.txt: " in result.output


# Other processes ------------------------------------------------------------------------------------------------------
def test_torchrun_draws_the_files_of_one_process(small_bundle: Bundle, undisturbed: Path, tmp_path: Path) -> None:
    """The launcher itself; what becomes of its processes when they die is for tests/faults.py."""
    options = ["--bundle", str(small_bundle.folder), "--seeds", "0-9", "--batch", "4", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "dgfast.sample", *options, "--out", str(tmp_path / "out")]
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("10 images in") == 1
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert _manifest(tmp_path / "out")["runs"][0]["processes"] == 2


@pytest.mark.long
def test_faults_lose_nothing() -> None:
    """21 random moments of three signals, and every other fault of the table; its long form has 300."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults", "--kills", "7"]
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count("\n") == 2 + 10


def test_signal_handlers_are_given_back(small_bundle: Bundle, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert _run(small_bundle, tmp_path / "out").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert to_uint8(torch.zeros(1, 1, 1, 1)).item() == 128
