"""From a bundle to a TensorRT engine: any function, any guidance, weights beside the file."""

import hashlib
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from benchmarks.workloads import RandomNetworks
from dgfast import GuidanceConfig, SamplingConfig
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


def test_trt_parses_the_guided_step_of_a_published_network(tmp_path: Path) -> None:
    """EDM's CIFAR-10 network with its discriminator and the gradient: narrower, and one block where it has four."""
    score = {
        "kind": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 32, "img_channels": 3, "augment_dim": 9,
        "model_channels": 32, "channel_mult": [2, 2, 2], "num_blocks": 1, "attn_resolutions": [16],
    }  # fmt: skip
    encoder = {
        "kind": "create_classifier", "classifier_use_fp16": False, "classifier_width": 64, "classifier_depth": 1,
        "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True, "classifier_pool": "attention",
    }  # fmt: skip
    networks = RandomNetworks(score, encoder | {"image_size": 32}, encoder | {"image_size": 8, "out_channels": 1})
    made = networks.load(torch.device("cpu"), torch.float32)
    subject = joint(made, SamplingConfig(), GuidanceConfig(dg_weight=2.0), "denoiser")
    example = dict(subject.case("example", [1.0], seed=1).inputs)
    onnx_file.save(convert(subject.function, example, subject.outputs, rank_4=True), tmp_path / "published.onnx")
    assert parse(find("tensorrt-rtx")[1], tmp_path / "published.onnx") > 2000
