"""`export/to_trt.py` without a GPU: TensorRT for RTX builds here, and executes nothing."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dgfast import sample
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.tensorrt import engine as tensorrt
from dgfast.runtimes.tensorrt import file as engine_file
from dgfast.runtimes.tensorrt.file import NEVER_EXECUTED, EngineFile
from tests.support.tensorrt import CPU_ONLY, TRT, run


@CPU_ONLY
def test_trt_script_says_what_was_never_executed(engine: EngineFile, file: Path) -> None:
    report = (engine.folder / "report.md").read_text()
    assert f"{NEVER_EXECUTED} (no CUDA GPU on this machine)" in report.splitlines()[0]
    assert "Nothing is known of its values or its speed" in report
    assert engine.parity == NEVER_EXECUTED and engine.gpu is None and not engine.errors
    assert engine.batch == (1, 4, 8) and engine.version == TRT.__version__
    assert engine.source["onnx_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hashlib.sha256(engine.plan()).hexdigest() == engine.sha256
    assert "| correlation | 2 |" in (engine.folder / "layers.md").read_text()
    inputs, outputs = tensorrt.read_self_test(engine.self_test)
    made = OnnxEngine(file)({name: torch.from_numpy(a) for name, a in inputs.items()})
    assert set(outputs) == set(made) and all(np.allclose(outputs[name], made[name]) for name in made)


def test_trt_script_only_parses_if_asked(file: Path, tmp_path: Path) -> None:
    done = run("--onnx", str(file), "--parse-only", "--out", str(tmp_path))
    assert done.exit_code == 0 and "no error; nothing was built" in done.output
    assert not list(tmp_path.glob("*.engine"))


def test_trt_script_rounds_a_float32_file_but_no_other(file: Path, tmp_path: Path) -> None:
    done = run("--onnx", str(file), "--dtype", "fp16", "--batch", "2", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = engine_file.read(tmp_path)
    assert (found.dtype, found.batch, found.tolerance) == ("fp16", (2, 2, 2), 2e-2)
    assert "Half" in (tmp_path / "layers.md").read_text()
    again = run("--onnx", str(tmp_path / "model-fp16.onnx"), "--dtype", "bf16", "--out", str(tmp_path / "again"))
    assert again.exit_code == 2 and "is in fp16; give the float32 file" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "{tmp}/none.onnx"], "none.onnx: not a readable ONNX file"),
        (["--onnx", "{tmp}/text.onnx"], "text.onnx: not a readable ONNX file"),
        ([], "give either --bundle or --onnx"),
        (["--bundle", "mnist32", "--onnx", "x"], "give either --bundle or --onnx"),
        (["--onnx", "x", "--batch", "1,2"], "expected one batch size or three"),
        (
            ["--onnx", "x", "--cfg-scale", "2", "--what", "step"],
            "x has its function inside: leave out --what, --cfg-scale",
        ),
        (
            ["--bundle", "mnist32", "--what", "generator", "--dg-weight", "1"],
            "a generator has no solver and no guidance: leave out --dg",
        ),
        (["--bundle", "nowhere"], "unknown bundle 'nowhere'"),
    ],
)
def test_trt_script_refuses_in_a_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    done = run(*given, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and message in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("Error")]) == 1


@CPU_ONLY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--runtime tensorrt needs --engine FILE"),
        (("--engine", "{folder}/model.engine"), "engines run on NVIDIA GPUs only"),
        (("--engine", "nowhere/model.engine"), "cannot read"),
    ],
)
def test_trt_sampling_without_what_it_needs_ends_in_a_line(
    options: tuple[str, ...], message: str, engine: EngineFile, tmp_path: Path
) -> None:
    given = [option.format(folder=engine.folder) for option in options]
    arguments = ["--runtime", "tensorrt", *given, "--seeds", "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(sample.main, arguments)
    assert done.exit_code == 2 and message in done.output and not (tmp_path / "out").exists()
