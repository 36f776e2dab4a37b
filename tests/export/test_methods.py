"""Files of what is neither a plain denoiser nor a step: the guided posterior, the one-step generator."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.engines import require_fit
from dgfast.errors import UserError
from dgfast.export import to_onnx
from dgfast.image_folder import read_images
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.sample import main as sample

_ADM = {
    "model_type": "create_model", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "num_channels": 32,
    "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8", "num_head_channels": 32,
}  # fmt: skip
_CLASSIFIER = {
    "image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "num_head_channels": 32,
}  # fmt: skip
_GENERATOR = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "latent_dim": 6, "channels": [16, 8]}
_RARE = ["--diversity", "9", "--fidelity", "5", "--normalize", "sample_l2", "--base-class", "2"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, filled_net: Callable[..., nn.Module]) -> Bundle:
    """An ADM of 8 x 8 pixels, its classifier, and a generator."""
    folder = tmp_path_factory.mktemp("bundles") / "adm"
    found = Bundle(folder, "adm", {}, SamplingConfig(solver="ddpm", respacing="4", clip_denoised=True))
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "score": ("DDPMPrecond", _ADM), "classifier": ("EncoderUNetModel", _CLASSIFIER),
        "generator": ("Generator", _GENERATOR),
    }  # fmt: skip
    for role, (kind, keywords) in kinds.items():
        found = bundles.with_net(found, role, filled_net(kind, keywords, f"export/{role}/"), kind, keywords)
    bundles.write(found)
    return bundles.read(folder)


def _export(bundle: Bundle, out: Path, *options: str) -> Path:
    done = CliRunner().invoke(to_onnx.main, ["--bundle", str(bundle.folder), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    (path,) = out.glob("*.onnx")
    return path


def _images(bundle: Bundle, out: Path, *options: str) -> np.ndarray:
    job = ["--bundle", str(bundle.folder), "--seeds", "0-3", "--batch", "2", "--device", "cpu", "--format", "npz"]
    done = CliRunner().invoke(sample, [*job, "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return read_images(out)[0].astype(int)


def test_export_of_an_ancestral_bundle_is_its_posterior(bundle: Bundle, tmp_path: Path) -> None:
    path = _export(bundle, tmp_path / "file", "--batch", "2", *_RARE)
    engine = OnnxEngine(path)
    assert path.name == "adm-posterior-b2-float32.onnx"
    assert list(engine.inputs) == ["x", "sigma", "class_labels", "log_least", "log_most", "diversity", "fidelity"]
    assert list(engine.outputs) == ["denoised", "shift", "variance", "log_ratio"]
    assert engine.metadata["predicts_noise"] == "true"  # what its self-test must allow for
    report = json.loads(path.with_suffix(".parity.json").read_text())
    assert {row["output"] for row in report["rows"]} == {*engine.outputs, "x"} and report["passed"]
    eager = _images(bundle, tmp_path / "eager", *_RARE)
    drawn = _images(bundle, tmp_path / "onnx", *_RARE, "--runtime", "onnx", "--engine", str(path))
    off = _images(bundle, tmp_path / "off", "--runtime", "onnx", "--engine", str(path))
    assert np.abs(drawn - eager).max() <= 1 and np.abs(off - eager).max() > 3
    assert np.abs(off - _images(bundle, tmp_path / "plain")).max() <= 1


def test_export_of_a_generator_draws_its_images(bundle: Bundle, tmp_path: Path) -> None:
    path = _export(bundle, tmp_path / "file", "--what", "generator")
    assert list(OnnxEngine(path).inputs) == ["latents", "class_labels"]
    cases = path.with_suffix(".parity.txt").read_text()
    assert all(case in cases for case in ("batch 1", "batch 5", "4 x the latents", "no class"))
    eager = _images(bundle, tmp_path / "eager", "--one-step")
    drawn = _images(bundle, tmp_path / "onnx", "--one-step", "--runtime", "onnx", "--engine", str(path))
    assert eager.std() > 10 and np.abs(drawn - eager).max() <= 1
    with pytest.raises(UserError, match="holds generator; export with --what posterior"):
        require_fit(OnnxEngine(path), bundle, bundle.sampling, bundle.guidance)
    done = CliRunner().invoke(to_onnx.main, ["--bundle", str(bundle.folder), "--what", "generator", "--dg-weight", "1"])
    assert done.exit_code == 2 and "a generator has no solver and no guidance: leave out --dg-weight" in done.output


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"diversity": 1.0}, {"diversity": 2.0}, None),
        ({"diversity": 1.0}, {"diversity": 2.0, "perceptual": True}, None),
        ({"diversity": 1.0, "target_class": 1}, {}, None),
        ({"diversity": 1.0, "target_class": 1}, {"diversity": 1.0}, "another target_class, 1"),
        ({"fidelity": 1.0, "normalize": "max_abs"}, {"fidelity": 1.0}, "another normalize, max_abs"),
        ({"fidelity": 1.0}, {"fidelity": 1.0, "clean_time": "0"}, "another clean_time, t"),
        ({"dg_weight": 1.0, "dg_schedule": ((0.1, 0.0), (0.5, 1.0))}, {"dg_weight_2nd": 1.0}, "another dg_schedule"),
        ({"dg_weight": 1.0, "dg_schedule": ((0.1, 0.0),)}, {"dg_weight": 2.0, "dg_schedule": ((0.1, 0.0),)}, None),
        ({"cfg_scale": 2.0}, {"cfg_scale": 2.0, "cfg_scale_low": 3.0, "cfg_branch": 1.0}, "another cfg_branch, 0.0"),
        ({"dg_weight": 1.0}, {"dg_weight": 1.0, "boosting": True}, None),  # `guided_by` misses its factor
    ],
)
def test_engine_settings_that_are_inside_of_a_file_must_agree(
    bundle: Bundle, made: dict[str, Any], asked: dict[str, Any], message: str | None
) -> None:
    sampling = replace(bundle.sampling, solver="heun", respacing=None)
    metadata = {
        "what": "denoiser", "weights_sha256": bundle.fingerprint(), "sampling": json.dumps(vars(sampling)),
        "guidance": json.dumps(vars(GuidanceConfig(**made))),
    }  # fmt: skip
    engine: Any = SimpleNamespace(path=Path("f.onnx"), inputs=dict.fromkeys(made), metadata=metadata)
    if message is None:
        require_fit(engine, bundle, sampling, GuidanceConfig(**asked))
    else:
        with pytest.raises(UserError, match=message):
            require_fit(engine, bundle, sampling, GuidanceConfig(**asked))
