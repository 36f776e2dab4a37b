"""From a bundle to a TensorRT engine: any function, any guidance, weights beside the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from torch import nn

from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import to_trt
from dgfast.runtimes import engine_file
from dgfast.runtimes.engine_file import EngineFile
from dgfast.runtimes.tensorrt_library import find

try:
    find("tensorrt-rtx")
except UserError:  # it has wheels for Linux on x86-64 only
    pytest.skip("TensorRT for RTX is not installed", allow_module_level=True)

_SCORE = {
    "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
_GENERATOR = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "latent_dim": 6, "channels": [16, 8]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, filled_net: Callable[..., nn.Module]) -> Bundle:
    """Score network and generator of 8 x 8 pixels and three classes."""
    found = Bundle(tmp_path_factory.mktemp("bundles") / "small", "small", {})
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "score": ("EDMPrecond", _SCORE), "generator": ("Generator", _GENERATOR),
    }  # fmt: skip
    for role, (kind, keywords) in kinds.items():
        found = bundles.with_net(found, role, filled_net(kind, keywords, f"trt/{role}/"), kind, keywords)
    bundles.write(found)
    return bundles.read(found.folder)


def run(bundle: Bundle, out: Path, *options: str) -> str:
    arguments = ["--flavor", "tensorrt-rtx", "--bundle", str(bundle.folder), "--batch", "2", "--out", str(out)]
    done = CliRunner().invoke(to_trt.main, [*arguments, *options])
    assert done.exit_code == 0, done.output
    return str(done.output)


def engine(bundle: Bundle, out: Path, *options: str) -> EngineFile:
    run(bundle, out, *options)
    return engine_file.read(out)


def test_trt_takes_a_bundle_under_other_guidance_than_its_own(bundle: Bundle, tmp_path: Path) -> None:
    printed = run(bundle, tmp_path, "--what", "step", "--cfg-scale", "2", "--parse-only")
    assert "no error; nothing was built" in printed
    (path,) = tmp_path.glob("*.onnx")
    assert path.name == "small-step-b2-float32.onnx"
    names = [given.name for given in onnx.load(path).graph.input]
    assert names == ["x", "sigma", "sigma_next", "class_labels", "cfg_scale"]


def test_trt_builds_the_generator_of_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    found = engine(bundle, tmp_path, "--what", "generator")
    assert found.source["what"] == "generator" and found.source["for"] == "tensorrt"
    assert found.source["weights_sha256"] == bundle.fingerprint() and found.batch == (2, 2, 2)
