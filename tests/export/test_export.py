"""From a bundle to a file that is proved, and from the file to images: `export/`, `--engine` and the example."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.engines import guided_by, require_fit
from dgfast.errors import UserError
from dgfast.export import onnx_file, parity, to_onnx
from dgfast.export.joint_graph import joint
from dgfast.export.parity import Case, Row, compare, signature
from dgfast.export.subject import Joint
from dgfast.image_folder import read_images
from dgfast.job import Job
from dgfast.networks import load
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.sample import main as sample
from tests.support.paths import ROOT

_SCORE = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
_ENCODER = {"num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16, "model_channels": 16}
_TRUNK = {"image_size": 8, "in_channels": 1, "out_channels": 10, "channel_mult": [1, 2], "resblock_updown": True}
_HEAD = {
    "image_size": 4, "in_channels": 32, "out_channels": 1, "channel_mult": [1], "num_classes": 10,
    "use_scale_shift_norm": True, "pool": "attention",
}  # fmt: skip


def _make(folder: Path, roles: tuple[str, ...]) -> Bundle:
    """A bundle whose networks have random weights everywhere: what is zero would hide the guidance."""
    bundle = Bundle(folder, folder.name, {}, SamplingConfig(num_steps=4), GuidanceConfig(dg_weight=2.0))
    described = {
        "score": ("EDMPrecond", _SCORE), "classifier": ("EncoderUNetModel", _ENCODER | _TRUNK),
        "discriminator": ("EncoderUNetModel", _ENCODER | _HEAD),
    }  # fmt: skip
    torch.manual_seed(0)
    for role in roles:
        kind, keywords = described[role]
        net = nets.build(kind, **keywords)
        for name, parameter in net.named_parameters():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.data.add_(1)
        bundle = bundles.with_net(bundle, role, net, kind, keywords)
    bundles.write(bundle)
    return bundles.read(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _make(tmp_path_factory.mktemp("bundles") / "small", ("score", "classifier", "discriminator"))


@pytest.fixture(scope="module")
def subject(bundle: Bundle) -> Joint:
    return joint(load(bundle), bundle.sampling, bundle.guidance, "denoiser")


def _export(*options: str) -> Result:
    return CliRunner().invoke(to_onnx.main, list(options))


@pytest.fixture(scope="module")
def denoiser_file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("denoiser")
    done = _export("--bundle", str(bundle.folder), "--out", str(out))
    assert done.exit_code == 0, done.output
    return out / "small-denoiser-dynamic-float32.onnx"


@pytest.fixture(scope="module")
def step_file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("step")
    options = ["--what", "step", "--batch", "40", "--dg-weight-2nd", "1"]
    done = _export("--bundle", str(bundle.folder), *options, "--out", str(out))
    assert done.exit_code == 0, done.output
    return out / "small-step-b40-float32.onnx"


# The file -------------------------------------------------------------------------------------------------------------
def test_export_leaves_a_proved_file_and_its_report(denoiser_file: Path, bundle: Bundle) -> None:
    report = json.loads(denoiser_file.with_suffix(".parity.json").read_text())
    assert report["passed"] and report["weights_sha256"] == bundle.fingerprint()
    assert {row["output"] for row in report["rows"]} == {"denoised", "log_ratio", "x"}
    assert all(row["error"] <= 1e-4 for row in report["rows"])
    cases = " ".join(row["case"] for row in report["rows"])
    assert all(wanted in cases for wanted in ("batch 1", "batch 5", "sigma 80", "160", "0.002", "amplified", "steps"))
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
        wanted = plain(off.inputs["x"], off.inputs["sigma"], off.inputs["class_labels"])
    assert torch.allclose(engine(off.inputs)["denoised"], wanted, atol=1e-5)
    assert not torch.allclose(engine(usual.inputs)["denoised"], wanted, atol=1e-5)


def test_export_window_is_inside_of_the_file(denoiser_file: Path, subject: Joint) -> None:
    """Samples beyond the window are not guided though their neighbours in the batch are."""
    engine, levels = OnnxEngine(denoiser_file), [0.04, 0.05, 150.0, 155.0]
    found = [engine(subject.case("", levels, 5, {"dg_weight": w}).inputs) for w in (0.0, 100.0)]
    guided = (found[0]["denoised"] != found[1]["denoised"]).flatten(1).any(1)
    assert guided.tolist() == [False, True, True, False]
    assert (found[0]["log_ratio"] == 1e7).tolist() == [True, False, False, True]


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
    done = _export("--bundle", str(bundle.folder), "--dtype", "fp16", "--batch", "2", "--out", str(tmp_path))
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
    monkeypatch.setitem(onnx_file.TOLERANCES, "float32", 1e-12)
    done = _export("--bundle", str(bundle.folder), "--batch", "1", "--dg-weight", "0", "--out", str(tmp_path))
    assert done.exit_code == 1 and "differs by" in done.output
    assert not list(tmp_path.glob("*.onnx*")) and len(list(tmp_path.glob("*.parity.*"))) == 2
    assert not json.loads(next(tmp_path.glob("*.json")).read_text())["passed"]


def test_export_without_discriminator_says_so(tmp_path: Path) -> None:
    bundle = _make(tmp_path / "unguided", ("score",))
    done = _export("--bundle", str(bundle.folder), "--batch", "2", "--out", str(tmp_path / "out"))
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
    done = _export("--bundle", str(bundle.folder), "--out", str(tmp_path), *options)
    assert done.exit_code == 2 and message in done.output and not list(tmp_path.glob("*.onnx"))


def test_export_knows_only_plans_of_equal_steps(bundle: Bundle) -> None:
    networks = load(bundle)
    with pytest.raises(UserError, match="linear schedule"):
        joint(networks, replace(bundle.sampling, schedule="vp"), bundle.guidance, "step")
    with pytest.raises(UserError, match="boosting"):
        joint(networks, bundle.sampling, replace(bundle.guidance, boosting=True), "step")


# The checker ----------------------------------------------------------------------------------------------------------
def test_parity_catches_a_gradient_that_was_baked_in(subject: Joint) -> None:
    """An exporter that takes the example's gradient for a constant is right at the example only."""
    example = subject.case("example", [1.0, 1.0], seed=1)
    off = dict(example.inputs) | {"dg_weight": torch.zeros(1)}
    baked = subject(example.inputs)["denoised"] - subject(off)["denoised"]

    def candidate(inputs: parity.Tensors) -> dict[str, Tensor]:
        found = subject(dict(inputs) | {"dg_weight": torch.zeros(1)})
        return found | {"denoised": found["denoised"] + baked * inputs["dg_weight"] / 2}

    assert compare(subject, candidate, [example], 1e-4).passed
    report = compare(subject, candidate, [subject.amplified("other", [1.0, 1.0], seed=2)], 1e-4)
    with pytest.raises(parity.ValueMismatchError, match="other: denoised: differs by"):
        report.check()


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"z": torch.ones(2, 3)}, parity.NameMismatchError),
        ({"y": torch.ones(2, 3, dtype=torch.float16)}, parity.DtypeMismatchError),
        ({"y": torch.ones(3, 2)}, parity.ShapeMismatchError),
        ({"y": torch.full((2, 3), 1.1)}, parity.ValueMismatchError),
        ({"y": torch.full((2, 3), torch.nan)}, parity.ValueMismatchError),
    ],
)
def test_parity_names_what_differs(found: dict[str, Tensor], error: type[Exception]) -> None:
    report = compare(lambda _: {"y": torch.ones(2, 3)}, lambda _: found, [Case("a", {})], 1e-2, {"y": torch.float32})
    assert not report.passed and error.__name__ in report.table() and not json.loads(report.json())["passed"]
    with pytest.raises(error):
        report.check()


@pytest.fixture(scope="module")
def small_denoised(tmp_path_factory: pytest.TempPathFactory) -> Joint:
    """A whole step of a network whose denoised image is small at sigma 80, as it is for data of mean 0."""
    score = _SCORE | {"label_dim": 0, "model_channels": 8}
    net = nets.build("EDMPrecond", **score)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "mean-0", "mean-0", {}, SamplingConfig(num_steps=4))
    bundles.write(bundles.with_net(bundle, "score", net, "EDMPrecond", score))
    made = joint(load(bundles.read(bundle.folder)), bundle.sampling, bundle.guidance, "step")
    last = made.last(made.case("", [80.0], 100))
    assert made(last.inputs)["x_next"].abs().max() < 0.1 < 100 < last.inputs["x"].abs().max()
    return made


def test_parity_judges_the_step_to_sigma_0_by_what_float32_keeps_of_the_noisy_image(small_denoised: Joint) -> None:
    def single(inputs: parity.Tensors) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"x_next": small_denoised.function(*(inputs[name] for name in small_denoised.inputs))[0]}

    assert {row.problem for row in compare(small_denoised, single, small_denoised.cases(1), 1e-4).rows} == {""}


@pytest.mark.parametrize("sigma", [0.01, 0.5, 80.0])
def test_parity_finds_what_is_wrong_in_the_step_to_sigma_0(small_denoised: Joint, sigma: float) -> None:
    last = small_denoised.last(small_denoised.case("", [sigma], 100))

    def off(inputs: parity.Tensors) -> dict[str, Tensor]:
        return {name: value * 1.02 for name, value in small_denoised(inputs).items()}

    assert not compare(small_denoised, off, [last], 1e-4).passed


def test_export_keeps_a_step_whose_denoised_images_are_small(small_denoised: Joint, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    metadata = {"predicts_noise": "false"}
    onnx_file.export(small_denoised, path, batch=1, dtype="float32", opset=18, metadata=metadata)
    OnnxEngine(path).self_test()


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"y": (("batch", 3), "float")}, "NameMismatchError"),
        ({"x": ((2, 3), "float")}, "AxesMismatchError"),
        ({"x": (("batch", 4), "float")}, "ShapeMismatchError"),
        ({"x": (("batch", 3), "half")}, "DtypeMismatchError"),
        ({"x": (("n", 3), "float")}, ""),
    ],
)
def test_parity_names_what_differs_in_a_signature(found: dict[str, Any], problem: str) -> None:
    rows = list(signature({"x": (("batch", 3), "float")}, found, "inputs"))
    assert [row.problem for row in rows] == ([problem] if problem else [])


def test_parity_passes_what_is_equal_and_keeps_the_largest_error() -> None:
    rows = [Row("a", "y", 1e-6, 1e-4), Row("b", "y", 3e-6, 1e-4)]
    report = parity.Report(rows, {"bundle": "small"})
    report.check()
    assert report.worst == {"y": 3e-6} and "bundle: small" in report.table()


# The engine in a sampler ----------------------------------------------------------------------------------------------
def _sample(bundle: Bundle, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle.folder), "--seeds", "0-4", "--device", "cpu", "--format", "npz", "--out", str(out)]
    return CliRunner().invoke(sample, [*base, *options])


def _images(folder: Path) -> np.ndarray:
    return read_images(folder)[0].astype(int)


def test_engine_samples_the_images_of_eager(bundle: Bundle, denoiser_file: Path, tmp_path: Path) -> None:
    options = {"eager": [], "onnx": ["--runtime", "onnx", "--engine", str(denoiser_file)]}
    for name, given in options.items():
        done = _sample(bundle, tmp_path / name, "--batch", "3", *given)
        assert done.exit_code == 0, done.output
    assert np.abs(_images(tmp_path / "onnx") - _images(tmp_path / "eager")).max() <= 1
    assert json.loads((tmp_path / "onnx/manifest.json").read_text())["job"]["runtime"] == "onnx"


def test_engine_refuses_another_job(bundle: Bundle, denoiser_file: Path, step_file: Path, tmp_path: Path) -> None:
    engine = OnnxEngine(denoiser_file)

    def fits(sampling: SamplingConfig = bundle.sampling, guidance: GuidanceConfig = bundle.guidance) -> None:
        require_fit(engine, bundle, sampling, guidance)

    fits()
    other = _make(tmp_path / "other", ("score",))
    for fit, message in (
        (
            lambda: require_fit(OnnxEngine(step_file), bundle, bundle.sampling, bundle.guidance),
            "holds step; export with --what denoiser",
        ),
        (lambda: require_fit(engine, other, bundle.sampling, bundle.guidance), "was exported from other weights"),
        (
            lambda: require_fit(engine, bundle, bundle.sampling, replace(bundle.guidance, dg_window=(0.1, 0.9))),
            "another dg_window",
        ),
        (lambda: require_fit(engine, bundle, bundle.sampling, replace(bundle.guidance, dg_every=2)), "dg-every"),
    ):
        with pytest.raises(UserError, match=message):
            fit()
    classifier_free = joint(load(bundle), bundle.sampling, GuidanceConfig(cfg_scale=2.0), "denoiser")
    assert classifier_free.weights == {"cfg_scale": 2.0}
    done = _sample(bundle, tmp_path / "out", "--runtime", "onnx", "--engine", str(denoiser_file), "--cfg-scale", "2")
    assert done.exit_code == 2 and "has no cfg_scale: export it with --cfg-scale" in done.output
    unguided = Job(load(bundle), bundle.sampling, GuidanceConfig()).called(())
    assert guided_by(engine, unguided)


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
    found, wanted = (run(case.inputs)["x_next"] for run in (OnnxEngine(step_file), subject))
    assert bool(found.isfinite().all()) and torch.allclose(found, wanted, atol=1e-5)


def test_export_scripts_do_not_shadow_what_they_import() -> None:
    names = {path.stem for path in (ROOT / "export").glob("*.py")}
    assert not any(importlib.util.find_spec(name) for name in names)
