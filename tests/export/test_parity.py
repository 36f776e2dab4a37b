"""The checker of exported files: it names whatever differs, and passes what is equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.config import SamplingConfig
from dgfast.export import onnx_file, parity
from dgfast.export.joint_graph import joint
from dgfast.export.parity import Case, Row, compare, signature
from dgfast.export.subject import Joint
from dgfast.networks import load
from dgfast.runtimes.onnx.session import OnnxEngine
from tests.support.export import SCORE


def test_parity_catches_a_gradient_that_was_baked_in(subject: Joint) -> None:
    """An exporter that takes the example's gradient for a constant is right at the example only."""
    example = subject.case("example", [1.0, 1.0], seed=1)
    off = dict(example.inputs) | {"dg_weight": torch.zeros(1)}
    baked = subject(example.inputs)["denoised"] - subject(off)["denoised"]

    def candidate(inputs: parity.Tensors) -> dict[str, Tensor]:
        outputs = subject(dict(inputs) | {"dg_weight": torch.zeros(1)})
        return outputs | {"denoised": outputs["denoised"] + baked * inputs["dg_weight"] / 2}

    assert compare(subject, candidate, [example], 1e-4).passed
    report = compare(subject, candidate, [subject.amplified("other", [1.0, 1.0], seed=2)], 1e-4)
    with pytest.raises(parity.ValueMismatchError, match="other: denoised: differs by"):
        report.check()


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        ({"z": torch.ones(2, 3)}, parity.NameMismatchError),
        ({"y": torch.ones(2, 3, dtype=torch.float16)}, parity.DtypeMismatchError),
        ({"y": torch.ones(3, 2)}, parity.ShapeMismatchError),
        ({"y": torch.full((2, 3), 1.1)}, parity.ValueMismatchError),
        ({"y": torch.full((2, 3), torch.nan)}, parity.ValueMismatchError),
    ],
)
def test_parity_names_what_differs(outputs: dict[str, Tensor], error: type[Exception]) -> None:
    report = compare(lambda _: {"y": torch.ones(2, 3)}, lambda _: outputs, [Case("a", {})], 1e-2, {"y": torch.float32})
    assert not report.passed and error.__name__ in report.table() and not json.loads(report.json())["passed"]
    with pytest.raises(error):
        report.check()


@pytest.fixture(scope="module")
def small_denoised(tmp_path_factory: pytest.TempPathFactory) -> Joint:
    """A whole step of a network whose denoised image is small at sigma 80, as it is for data of mean 0."""
    score = SCORE | {"label_dim": 0, "model_channels": 8}
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
    ("inputs", "problem"),
    [
        ({"y": (("batch", 3), "float")}, "NameMismatchError"),
        ({"x": ((2, 3), "float")}, "AxesMismatchError"),
        ({"x": (("batch", 4), "float")}, "ShapeMismatchError"),
        ({"x": (("batch", 3), "half")}, "DtypeMismatchError"),
        ({"x": (("n", 3), "float")}, ""),
    ],
)
def test_parity_names_what_differs_in_a_signature(inputs: dict[str, Any], problem: str) -> None:
    rows = list(signature({"x": (("batch", 3), "float")}, inputs, "inputs"))
    assert [row.problem for row in rows] == ([problem] if problem else [])


def test_parity_passes_what_is_equal_and_keeps_the_largest_error() -> None:
    rows = [Row("a", "y", 1e-6, 1e-4), Row("b", "y", 3e-6, 1e-4)]
    report = parity.Report(rows, {"bundle": "small"})
    report.check()
    assert report.worst == {"y": 3e-6} and "bundle: small" in report.table()
