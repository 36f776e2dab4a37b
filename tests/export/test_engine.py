"""A file as engine of a sampler: `--engine`, what it refuses, and what it tests of itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig
from dgfast.engines import guided_by, require_fit
from dgfast.errors import UserError
from dgfast.export.joint_graph import joint
from dgfast.export.subject import Joint
from dgfast.image_folder import read_images
from dgfast.job import Job
from dgfast.networks import load
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.sample import main as sample
from tests.support.export import write_bundle


def _sample(bundle: Bundle, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle.folder), "--seeds", "0-4", "--device", "cpu", "--format", "npz", "--out", str(out)]
    return CliRunner().invoke(sample, [*base, *options])


def _images(folder: Path) -> np.ndarray:
    return read_images(folder)[0].astype(int)


def test_engine_samples_the_images_of_eager(bundle: Bundle, denoiser_file: Path, tmp_path: Path) -> None:
    options = {"eager": [], "onnx": ["--runtime", "onnx", "--engine", str(denoiser_file)]}
    for name, how in options.items():
        done = _sample(bundle, tmp_path / name, "--batch", "3", *how)
        assert done.exit_code == 0, done.output
    assert np.abs(_images(tmp_path / "onnx") - _images(tmp_path / "eager")).max() <= 1
    assert json.loads((tmp_path / "onnx/manifest.json").read_text())["job"]["runtime"] == "onnx"


def test_engine_decides_on_the_type_whatever_the_default_is(
    bundle: Bundle, denoiser_file: Path, tmp_path: Path
) -> None:
    model, half = onnx.load(str(denoiser_file)), tmp_path / "half.onnx"
    next(entry for entry in model.metadata_props if entry.key == "dtype").value = "fp16"
    save(model, half)
    options = ["--runtime", "onnx", "--engine", str(half), "--steps", "2"]
    assert _sample(bundle, tmp_path / "out", *options).exit_code == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["job"]["dtype"] == "fp16"
    refused = _sample(bundle, tmp_path / "other", *options, "--dtype", "float32")
    assert refused.exit_code == 2 and "half.onnx computes in fp16; leave --dtype out" in refused.output


def test_engine_refuses_another_job(bundle: Bundle, denoiser_file: Path, step_file: Path, tmp_path: Path) -> None:
    engine = OnnxEngine(denoiser_file)

    require_fit(engine, bundle, bundle.sampling, bundle.guidance)
    other = write_bundle(tmp_path / "other", ("score",))
    for file, its_bundle, guidance, message in (
        (OnnxEngine(step_file), bundle, bundle.guidance, "holds step; export with --what denoiser"),
        (engine, other, bundle.guidance, "was exported from other weights"),
        (engine, bundle, replace(bundle.guidance, dg_window=(0.1, 0.9)), "another dg_window"),
        (engine, bundle, replace(bundle.guidance, dg_every=2), "dg-every"),
    ):
        with pytest.raises(UserError, match=message):
            require_fit(file, its_bundle, bundle.sampling, guidance)
    classifier_free = joint(load(bundle), bundle.sampling, GuidanceConfig(cfg_scale=2.0), "denoiser")
    assert classifier_free.weights == {"cfg_scale": 2.0}
    done = _sample(bundle, tmp_path / "out", "--runtime", "onnx", "--engine", str(denoiser_file), "--cfg-scale", "2")
    assert done.exit_code == 2 and "has no cfg_scale: export it with --cfg-scale" in done.output
    unguided = Job(load(bundle), bundle.sampling, GuidanceConfig()).called(())
    assert guided_by(engine, unguided) is not None


def test_engine_options_must_agree(bundle: Bundle, tmp_path: Path) -> None:
    for options, message in (
        (["--compile", "--runtime", "onnx"], "contradict each other"),
        (["--engine", "file.onnx"], "--engine goes with --runtime onnx"),
        (["--runtime", "onnx", "--engine", str(tmp_path / "none.onnx")], "no such file"),
        (["--runtime", "onnx", "--provider", "tensorrt"], "has no tensorrt provider"),
    ):
        done = _sample(bundle, tmp_path / "out", *options)
        assert done.exit_code == 2 and message in done.output, done.output


def test_engine_refuses_other_shapes(denoiser_file: Path, subject: Joint, tmp_path: Path) -> None:
    engine = OnnxEngine(denoiser_file)
    inputs = dict(subject.case("", [1.0, 2.0], 3).inputs)
    with pytest.raises(UserError, match="its inputs are x, sigma, class_labels, dg_weight, not x"):
        engine({"x": inputs["x"]})
    with pytest.raises(UserError, match=r"x has shape \[2, 1, 4, 4\]"):
        engine(inputs | {"x": inputs["x"][:, :, :4, :4]})
    fixed = tmp_path / "fixed.onnx"
    model = onnx.load(str(denoiser_file))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    save(model, fixed)
    with pytest.raises(UserError, match="was made for batches of 4, not 2; give --batch 4"):
        OnnxEngine(fixed)(inputs)


def test_engine_self_test_names_the_first_output_that_differs(denoiser_file: Path, tmp_path: Path) -> None:
    OnnxEngine(denoiser_file).self_test()
    model, damaged = onnx.load(str(denoiser_file)), tmp_path / "damaged.onnx"
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    weight.raw_data = (1.1 * np.frombuffer(weight.raw_data, np.float32)).astype(np.float32).tobytes()
    save(model, damaged)
    with pytest.raises(UserError, match=r"self-test fails here: output (denoised|log_ratio) differs by"):
        OnnxEngine(damaged).self_test()


@pytest.mark.parametrize("stored", ["", "[]", '{"tolerance": 5}', '{"inputs": {}, "outputs": {}, "tolerance": 0.1}'])
def test_engine_reads_a_hostile_self_test_as_none(denoiser_file: Path, tmp_path: Path, stored: str) -> None:
    model, path = onnx.load(str(denoiser_file)), tmp_path / "hostile.onnx"
    next(entry for entry in model.metadata_props if entry.key == "self_test").value = stored
    save(model, path)
    with pytest.raises(UserError, match="no self-test of dgfast in it"):
        OnnxEngine(path).self_test()


def test_engine_corrupt_files_are_one_line(denoiser_file: Path, tmp_path: Path) -> None:
    whole = denoiser_file.read_bytes()
    for content in (b"", b"no model", whole[: len(whole) // 2]):
        (tmp_path / "corrupt.onnx").write_bytes(content)
        with pytest.raises(UserError, match="ONNX Runtime does not open it") as caught:
            OnnxEngine(tmp_path / "corrupt.onnx")
        assert "\n" not in caught.value.message
