"""From a bundle to a TensorRT engine: any function, any guidance, weights beside the file."""

import hashlib
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from benchmarks.workloads import WORKLOADS
from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import to_trt
from dgfast.export.joint_graph import joint
from dgfast.runtimes.onnx import file as onnx_file
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt import file as engine_file
from dgfast.runtimes.tensorrt.builder import parse
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import find

try:
    find("tensorrt-rtx")
except UserError:  # it has wheels for Linux on x86-64 only
    pytest.skip("TensorRT for RTX is not installed", allow_module_level=True)


def run(bundle: Bundle, out: Path, *options: str) -> str:
    arguments = ["--flavor", "tensorrt-rtx", "--bundle", str(bundle.folder), "--batch", "2", "--out", str(out)]
    done = CliRunner().invoke(to_trt.main, [*arguments, *options])
    assert done.exit_code == 0, done.output
    return str(done.output)


def engine(bundle: Bundle, out: Path, *options: str) -> EngineFile:
    run(bundle, out, *options)
    return engine_file.read(out)


def test_trt_takes_a_bundle_under_other_guidance_than_its_own(small_bundle: Bundle, tmp_path: Path) -> None:
    printed = run(small_bundle, tmp_path, "--what", "step", "--cfg-scale", "2", "--parse-only")
    assert "no error; nothing was built" in printed
    (path,) = tmp_path.glob("*.onnx")
    assert path.name == "small-step-b2-float32.onnx"
    names = [given.name for given in onnx.load(path).graph.input]
    assert names == ["x", "sigma", "sigma_next", "class_labels", "cfg_scale"]


def test_trt_builds_the_generator_of_a_bundle(small_bundle: Bundle, tmp_path: Path) -> None:
    found = engine(small_bundle, tmp_path, "--what", "generator")
    assert found.source["what"] == "generator" and found.source["for"] == "tensorrt"
    assert found.source["weights_sha256"] == small_bundle.fingerprint() and found.batch == (2, 2, 2)


def test_trt_reads_weights_that_are_beside_the_file(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LIMIT", 1000)
    run(small_bundle, tmp_path / "first", "--what", "generator", "--parse-only")
    (path,) = (tmp_path / "first").glob("*.onnx")
    assert path.with_name(f"{path.name}.data").stat().st_size > 10 * 1000
    done = CliRunner().invoke(to_trt.main, ["--onnx", str(path), "--dtype", "fp16", "--out", str(tmp_path / "engine")])
    assert done.exit_code == 0, done.output
    together = b"".join(file.read_bytes() for file in (path, path.with_name(f"{path.name}.data")))
    assert engine_file.read(tmp_path / "engine").source["onnx_sha256"] == hashlib.sha256(together).hexdigest()
    assert (tmp_path / "engine/model-fp16.onnx.data").is_file()
    path.with_name(f"{path.name}.data").unlink()
    for options in (["--parse-only"], ["--dtype", "fp16"]):
        done = CliRunner().invoke(to_trt.main, ["--onnx", str(path), *options, "--out", str(tmp_path / "again")])
        assert done.exit_code == 2 and f"{path.name}.data" in done.output, done.output


def test_trt_parses_the_full_size_guided_step(tmp_path: Path) -> None:
    """EDM's CIFAR-10 network with its discriminator and the gradient."""
    made = WORKLOADS["edm-cifar10"]()
    subject = joint(made.load(torch.device("cpu"), torch.float32), made.sampling, made.guidance, "denoiser")
    example = dict(subject.case("example", [1.0], seed=1).inputs)
    onnx_file.save(convert(subject.function, example, subject.outputs, rank_4=True), tmp_path / "full.onnx")
    assert (tmp_path / "full.onnx").stat().st_size > 4e8
    assert parse(find("tensorrt-rtx")[1], tmp_path / "full.onnx") > 5000
