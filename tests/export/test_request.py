"""From a command line to what is written: which function, under which name, saying what; and what is stored in it."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from dgfast import __version__
from dgfast import bundle as bundles
from dgfast.bundle import Bundle, NetSpec
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.export import onnx_file, request
from dgfast.export.parity import ParityError, Report, Row
from dgfast.export.request import Request
from dgfast.export.subject import GeneratorSubject, Joint


@pytest.fixture
def bundle(small_bundle: Bundle) -> Bundle:
    return replace(small_bundle, guidance=GuidanceConfig(cfg_scale=1.5), class_names=("a", "b", "c"))


@pytest.fixture
def read(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Request]:
    monkeypatch.setattr(bundles, "read", lambda name: bundle)
    return lambda **options: request.read("small", options)


# What is asked for ----------------------------------------------------------------------------------------------------
def test_request_takes_the_bundles_settings_where_no_option_says_otherwise(
    read: Callable[..., Request], bundle: Bundle
) -> None:
    plain = read(what=None, cfg_scale=None, batch=3, out="x")
    assert (plain.what, plain.guidance, plain.sampling) == (None, bundle.guidance, bundle.sampling)
    asked = read(what="step", cfg_scale=1.0, autoguidance=1.2, clip_denoised=True)
    assert asked.what == "step" and asked.guidance == GuidanceConfig(autoguidance=1.2)
    assert asked.sampling == replace(bundle.sampling, clip_denoised=True)
    assert read(cfg_scale=0.0).guidance.cfg_scale == 0.0  # a zero is an answer
    assert read(clip_denoised=False).sampling.clip_denoised is False


def test_request_leaves_the_discriminator_out_where_there_is_none_and_says_so(
    read: Callable[..., Request], bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(cfg_scale=2.0).guidance.cfg_scale == 2.0 and not capsys.readouterr().err
    for name in ("dg_weight", "dg_weight_2nd"):
        guidance = read(**{name: 2.0}).guidance
        assert (guidance.dg_weight, guidance.dg_weight_2nd, guidance.cfg_scale) == (0.0, 0.0, 1.5)
        assert "small has no discriminator network" in capsys.readouterr().err
    judged = replace(bundle, nets={**bundle.nets, "discriminator": NetSpec("EncoderUNetModel", {}, "d.safetensors")})
    monkeypatch.setattr(bundles, "read", lambda name: judged)
    assert read(dg_weight=2.0).guidance.dg_weight == 2.0 and not capsys.readouterr().err


def test_request_refuses_guidance_of_a_generator(read: Callable[..., Request]) -> None:
    with pytest.raises(UserError, match="leave out --dg-weight-2nd, --cfg-scale, or"):
        read(what="generator", dg_weight_2nd=1.0, cfg_scale=2.0)
    assert read(what="generator", batch=4).what == "generator"


def test_request_gives_the_function_that_was_asked_for(bundle: Bundle) -> None:
    for what, sampling, kind in (
        (None, bundle.sampling, "denoiser"),
        (None, replace(bundle.sampling, solver="ddpm"), "posterior"),
        ("step", bundle.sampling, "step"),
        ("generator", bundle.sampling, "generator"),
    ):
        subject = Request(bundle, what, sampling, bundle.guidance).subject()
        assert subject.what == kind and isinstance(subject, GeneratorSubject) == (kind == "generator")
        assert subject.outputs == {
            "denoiser": ("denoised", "log_ratio"), "step": ("x_next",), "generator": ("images",),
            "posterior": ("denoised", "shift", "variance", "log_ratio"),
        }[kind]  # fmt: skip


def test_request_says_of_its_function_what_a_sampler_must_know(bundle: Bundle) -> None:
    asked = Request(bundle, None, bundle.sampling, bundle.guidance)
    subject = asked.subject()
    said = asked.describe(subject)
    assert isinstance(subject, Joint) and all(isinstance(value, str) for value in said.values())
    assert (said["dgfast"], said["bundle"], said["what"]) == (__version__, "small", "denoiser")
    assert said["weights_sha256"] == bundle.fingerprint() and json.loads(said["class_names"]) == ["a", "b", "c"]
    assert SamplingConfig(**json.loads(said["sampling"])) == bundle.sampling
    assert json.loads(said["guidance"])["cfg_scale"] == 1.5 and json.loads(said["weights"]) == {"cfg_scale": 1.5}
    assert json.loads(said["sigmas"])[-1] == 0 and len(json.loads(said["sigmas"])) == 5
    assert said["predicts_noise"] == "false" and said["commit"]
    of_generator = Request(bundle, "generator", bundle.sampling, bundle.guidance)
    assert of_generator.describe(of_generator.subject()).keys() == {
        "dgfast", "commit", "bundle", "weights_sha256", "what", "class_names"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "dtype", "target", "name"),
    [
        (None, "float32", "onnxruntime", "small-denoiser-dynamic-float32.onnx"),
        (4, "fp16", "tensorrt", "small-denoiser-b4-fp16.onnx"),
    ],
)
def test_request_writes_a_file_named_after_what_is_in_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    batch: int | None, dtype: str, target: str, name: str,
) -> None:  # fmt: skip
    seen: dict[str, Any] = {}

    def export(subject: Any, path: Path, **options: Any) -> Report:
        seen.update(options, path=path)
        return Report([Row("a", "b", 1e-6, 1e-4)])

    monkeypatch.setattr(request, "export", export)
    asked = Request(bundle, None, bundle.sampling, bundle.guidance)
    assert asked.write(tmp_path, batch=batch, dtype=dtype, target=target) == seen["path"] == tmp_path / name
    assert (seen["batch"], seen["dtype"], seen["opset"]) == (batch, dtype, onnx_file.OPSET)
    assert seen["target"] == target
    assert "1.0e-06" in capsys.readouterr().out


def test_request_names_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    request.make_folder(tmp_path / "a" / "b")
    request.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/b: .*give another folder"):
        request.make_folder(tmp_path / "file" / "b")


# What is stored -------------------------------------------------------------------------------------------------------
def model(domain: str = "") -> Any:
    node = helper.make_node("Identity", ["x"], ["y"], domain=domain)
    x, y = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in ("x", "y"))
    return helper.make_model(helper.make_graph([node], "g", x, y))


def test_stamp_writes_each_key_once() -> None:
    stamped = model()
    onnx_file._stamp(stamped, {"a": "1", "b": "2"})
    onnx_file._stamp(stamped, {"b": "3", "c": "4"})
    assert [(entry.key, entry.value) for entry in stamped.metadata_props] == [("a", "1"), ("b", "3"), ("c", "4")]


def test_operations_of_others_are_named() -> None:
    onnx_file._require_domains(model(), set())
    onnx_file._require_domains(model("ai.onnx"), set())
    onnx_file._require_domains(model("com.other"), {"com.other"})
    with pytest.raises(ParityError, match=r"outside of ONNX's own: com\.other"):
        onnx_file._require_domains(model("com.other"), {"com.microsoft"})
    local = model()
    local.functions.append(onnx.FunctionProto())
    with pytest.raises(ParityError, match="local functions"):
        onnx_file._require_domains(local, set())


_DOUBLED = Joint(
    "denoiser", lambda x, w: (x * w,), ("x", "dg_weight"), ("denoised",), {"dg_weight": 2.0}, (1.0, 0.0), (1, 2, 2), 0
)  # fmt: skip


class Doubling:
    """An engine of one input for images and one weight, that keeps what it was called with."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def __call__(self, inputs: Any) -> dict[str, torch.Tensor]:
        self.seen = dict(inputs)
        return {"denoised": inputs["dg_weight"] * inputs["x"]}


@pytest.mark.parametrize(("batch", "dtype", "tolerance"), [(None, "float32", 1e-3), (3, "fp16", 0.2)])
def test_stored_self_test_is_one_sample_repeated(batch: int | None, dtype: str, tolerance: float) -> None:
    engine: Any = Doubling()
    stored = json.loads(onnx_file._self_test(engine, _DOUBLED, batch, dtype))
    assert stored["tolerance"] == pytest.approx(tolerance)
    assert engine.seen["x"].shape == (batch or 1, 1, 2, 2) and engine.seen["dg_weight"].shape == (1,)
    read = {
        side: {name: np.frombuffer(base64.b64decode(text), np.float32) for name, text in stored[side].items()}
        for side in ("inputs", "outputs")
    }
    assert read["inputs"]["x"].shape == (4,) and read["inputs"]["dg_weight"].tolist() == [2.0]
    np.testing.assert_allclose(read["outputs"]["denoised"], 2 * read["inputs"]["x"])


@pytest.mark.parametrize(
    ("inputs", "batch", "problems"),
    [
        ({"x": (("batch", 1, 2, 2), "tensor(float)"), "dg_weight": ((1,), "tensor(float)")}, None, []),
        ({"x": ((3, 1, 2, 2), "tensor(float)"), "dg_weight": ((1,), "tensor(float)")}, 3, []),
        ({"x": ((3, 1, 2, 2), "tensor(float)"), "dg_weight": ((1,), "tensor(float)")}, None, ["AxesMismatchError"]),
        ({"x": ((3, 1, 2, 2), "tensor(float)"), "dg_weight": ((3,), "tensor(float)")}, 3, ["ShapeMismatchError"]),
        ({"x": ((3, 1, 2, 2), "tensor(float16)"), "dg_weight": ((1,), "tensor(float)")}, 3, ["DtypeMismatchError"]),
        ({"dg_weight": ((1,), "tensor(float)"), "x": ((3, 1, 2, 2), "tensor(float)")}, 3, ["NameMismatchError"]),
    ],
)
def test_file_is_held_to_the_sizes_of_its_function(
    inputs: dict[str, Any], batch: int | None, problems: list[str]
) -> None:
    outputs = {"denoised": ((batch or "batch", 1, 2, 2), "tensor(float)")}
    engine: Any = SimpleNamespace(inputs=inputs, outputs=outputs)
    rows = list(onnx_file._signature_rows(engine, _DOUBLED, batch))
    assert [row.problem for row in rows] == problems
    if problems == ["ShapeMismatchError"]:
        assert rows[0].detail == "[3], not [1]"  # found, not wanted
