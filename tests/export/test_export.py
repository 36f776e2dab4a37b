"""From a bundle to a file that is proved: `export/to_onnx.py` and the example."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import proof
from dgfast.export.joint_graph import joint
from dgfast.export.subject import Joint
from dgfast.networks import load
from dgfast.runtimes.onnx.session import OnnxEngine
from tests.support.export import export, write_bundle
from tests.support.paths import ROOT


# The file -------------------------------------------------------------------------------------------------------------
def test_export_leaves_a_proved_file_and_its_report(denoiser_file: Path, bundle: Bundle) -> None:
    report = json.loads(denoiser_file.with_suffix(".parity.json").read_text())
    assert report["passed"] and report["weights_sha256"] == bundle.fingerprint()
    assert {row["output"] for row in report["rows"]} == {"denoised", "log_ratio", "x"}
    assert all(row["error"] <= 1e-4 for row in report["rows"])
    cases = " ".join(row["case"] for row in report["rows"])
    assert all(part in cases for part in ("batch 1", "batch 5", "sigma 80", "160", "0.002", "amplified", "steps"))
    assert "denoised" in denoiser_file.with_suffix(".parity.txt").read_text()
    metadata = OnnxEngine(denoiser_file).metadata
    assert (
        metadata["bundle"] == "small"
        and metadata["opset"] == "18"
        and json.loads(metadata["parity"])["denoised"] < 1e-4
    )


def test_export_file_has_inference_operations_of_onnx_alone(denoiser_file: Path, step_file: Path) -> None:
    for path in (denoiser_file, step_file):
        model = onnx.load(str(path))
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        assert [entry.domain for entry in model.opset_import] == [""]
        assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "Gradient"}


def test_export_weights_are_inputs(denoiser_file: Path, bundle: Bundle, subject: Joint) -> None:
    engine, plain = OnnxEngine(denoiser_file), load(bundle).denoiser
    off, usual = (subject.case("", [1.0, 0.3, 30.0], 5, {"dg_weight": w}) for w in (0.0, 2.0))
    with torch.no_grad():
        unguided = plain(off.inputs["x"], off.inputs["sigma"], off.inputs["class_labels"])
    assert torch.allclose(engine(off.inputs)["denoised"], unguided, atol=1e-5)
    assert not torch.allclose(engine(usual.inputs)["denoised"], unguided, atol=1e-5)


def test_export_window_is_inside_of_the_file(denoiser_file: Path, subject: Joint) -> None:
    """Samples beyond the window are not guided though their neighbours in the batch are."""
    engine, levels = OnnxEngine(denoiser_file), [0.04, 0.05, 150.0, 155.0]
    outputs = [engine(subject.case("", levels, 5, {"dg_weight": w}).inputs) for w in (0.0, 100.0)]
    guided = (outputs[0]["denoised"] != outputs[1]["denoised"]).flatten(1).any(1)
    assert guided.tolist() == [False, True, True, False]
    assert (outputs[0]["log_ratio"] == 1e7).tolist() == [True, False, False, True]


def test_export_fixed_batch_for_tensorrt_from_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    """As a script, from elsewhere, with the classifier's guidance too."""
    script = [sys.executable, str(ROOT / "export/to_onnx.py"), "--bundle", str(bundle.folder), "--batch", "3"]
    options = ["--for", "tensorrt", "--dg-weight", "0", "--classifier-scale", "1.5", "--cfg-scale", "2"]
    done = subprocess.run(
        [*script, *options, "--opset", "18", "--out", "files"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = onnx.load(str(tmp_path / "files/small-denoiser-b3-float32.onnx"))
    assert "LayerNormalization" not in {node.op_type for node in model.graph.node}
    assert [i.name for i in model.graph.input] == [
        "x",
        "sigma",
        "class_labels",
        "classifier_scale",
        "cfg_scale",
    ]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_export_half_precision_says_how_far_it_is_off(bundle: Bundle, tmp_path: Path) -> None:
    done = export("--bundle", str(bundle.folder), "--dtype", "fp16", "--batch", "2", "--out", str(tmp_path))
    report = json.loads((tmp_path / "small-denoiser-b2-fp16.parity.json").read_text())
    rounded = {
        as_on_a_gpu: [r for r in report["rows"] if ("GPU" in r["case"]) == as_on_a_gpu] for as_on_a_gpu in (0, 1)
    }
    assert done.exit_code == 0 and len(rounded[0]) == len(rounded[1])
    assert 1e-5 < max(row["error"] for row in rounded[1]) != max(row["error"] for row in rounded[0])
    model = onnx.load(str(tmp_path / "small-denoiser-b2-fp16.onnx"))
    halves = sum(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    assert halves and model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_export_that_fails_leaves_no_file(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proof.TOLERANCES, "float32", 1e-12)
    done = export("--bundle", str(bundle.folder), "--batch", "1", "--dg-weight", "0", "--out", str(tmp_path))
    assert done.exit_code == 1 and "differs by" in done.output
    assert not list(tmp_path.glob("*.onnx*")) and len(list(tmp_path.glob("*.parity.*"))) == 2
    assert not json.loads(next(tmp_path.glob("*.json")).read_text())["passed"]


def test_export_without_discriminator_says_so(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "unguided", ("score",))
    done = export("--bundle", str(bundle.folder), "--batch", "2", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "unguided has no discriminator network: exporting without discriminator guidance" in done.output
    assert list(OnnxEngine(tmp_path / "out/unguided-denoiser-b2-float32.onnx").inputs) == ["x", "sigma", "class_labels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "11"], "opset 11 is too old"),
        (["--batch", "many"], "give a number of images, or dynamic"),
        (["--autoguidance", "2"], "bundle small has no reference network"),
        (["--bundle", "nowhere"], "unknown bundle 'nowhere'"),
    ],
)
def test_export_bad_input_is_one_line(bundle: Bundle, tmp_path: Path, options: list[str], message: str) -> None:
    done = export("--bundle", str(bundle.folder), "--out", str(tmp_path), *options)
    assert done.exit_code == 2 and message in done.output and not list(tmp_path.glob("*.onnx"))


def test_export_knows_only_plans_of_equal_steps(bundle: Bundle) -> None:
    networks = load(bundle)
    with pytest.raises(UserError, match="linear schedule"):
        joint(networks, replace(bundle.sampling, schedule="vp"), bundle.guidance, "step")
    with pytest.raises(UserError, match="boosting"):
        joint(networks, bundle.sampling, replace(bundle.guidance, boosting=True), "step")


# Shipping without dgfast ----------------------------------------------------------------------------------------------
def test_example_draws_digits_without_torch_and_dgfast(step_file: Path, tmp_path: Path) -> None:
    example = ROOT / "examples/onnx_only.py"
    assert len(example.read_text().splitlines()) <= 45
    code = f"""
import runpy, sys
sys.argv = ["onnx_only.py", {str(step_file)!r}, "digits.png"]
runpy.run_path({str(example)!r})
assert not {{"torch", "dgfast", "PIL"}} & set(sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (80, 32) and np.asarray(picture).std() > 1


def test_example_step_file_reaches_sigma_zero(step_file: Path, bundle: Bundle) -> None:
    subject = joint(load(bundle), bundle.sampling, replace(bundle.guidance, dg_weight_2nd=1.0), "step")
    assert subject.inputs == ("x", "sigma", "sigma_next", "class_labels", "dg_weight", "dg_weight_2nd")
    case = subject.last(subject.case("", [0.002] * 40, 3))
    images, reference = (run(case.inputs)["x_next"] for run in (OnnxEngine(step_file), subject))
    assert bool(images.isfinite().all()) and torch.allclose(images, reference, atol=1e-5)


def test_export_scripts_do_not_shadow_what_they_import() -> None:
    names = {path.stem for path in (ROOT / "export").glob("*.py")}
    assert not any(importlib.util.find_spec(name) for name in names)
