"""`dgfast sample --preset` and `--state-dtype`: EDM2's settings by its own names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dgfast import bundle as bundles
from dgfast import nets, presets
from dgfast.bundle import Bundle
from dgfast.presets import File, Preset
from tests.support.sample import draw, images_of, manifest_of

SMALL: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 1000, "model_channels": 8, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
NAME = "edm2-img8-xxs-autog-fid"
NET, WORSE = File("img8", "xxs", "0000002", "0.070"), File("img8", "xs", "0000001", "0.125")


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of two networks that are quick to draw with."""
    monkeypatch.setitem(presets._SHAPES, "img8", (8, 3))
    monkeypatch.setitem(presets.CHANNELS, "xxs", 8)
    monkeypatch.setitem(presets.CHANNELS, "xs", 16)
    monkeypatch.setitem(presets.PRESETS, NAME, Preset(NET, WORSE, 2.1))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return _with(Bundle(tmp_path / "b", "b", {}), "score", SMALL)


def _with(bundle: Bundle, role: str, keywords: dict[str, Any]) -> Bundle:
    torch.manual_seed(len(role))
    net = nets.build("EDM2Precond", **keywords)
    torch.nn.init.ones_(net.get_parameter("unet.out_gain"))
    bundles.write(bundle := bundles.with_net(bundle, role, net, "EDM2Precond", keywords))
    return bundle


def _refusal(bundle: Bundle, out: Path, name: str) -> str:
    result = draw(bundle.folder, out, "--preset", name)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1, result
    assert not out.exists()
    return result.output


@pytest.mark.usefixtures("small_presets")
def test_preset_sets_steps_state_and_weight_under_other_options(bundle: Bundle, tmp_path: Path) -> None:
    bundle = _with(bundle, "reference", SMALL | {"model_channels": 16})
    results = [
        draw(bundle.folder, tmp_path / "preset", "--preset", NAME),
        draw(bundle.folder, tmp_path / "told", "--state-dtype", "float32", "--autoguidance", "2.1"),
        draw(bundle.folder, tmp_path / "over", "--preset", NAME, "--autoguidance", "1"),
    ]
    assert all(result.exit_code == 0 for result in results), results
    job = manifest_of(tmp_path / "preset")["job"]
    assert (job["sampling"]["state_dtype"], job["guidance"]["autoguidance"]) == ("float32", 2.1)
    assert job["sampling"]["num_steps"] == 3, "draw's --steps goes over the preset's 32"
    assert manifest_of(tmp_path / "told")["job"] == job
    assert (images_of(tmp_path / "preset") == images_of(tmp_path / "told")).all()
    assert (images_of(tmp_path / "preset") != images_of(tmp_path / "over")).any()


@pytest.mark.usefixtures("small_presets")
def test_preset_says_which_files_to_bring(bundle: Bundle, tmp_path: Path) -> None:
    said = _refusal(bundle, tmp_path / "out", NAME)
    assert f"needs {NET.name} as score and {WORSE.name} as reference" in said
    assert f"dgfast convert {WORSE.name} --role reference --out {bundle.folder}" in said and "no score" not in said


@pytest.mark.usefixtures("small_presets")
def test_preset_of_another_size_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    said = _refusal(bundle, tmp_path / "out", "edm2-img512-s-autog-fid")
    assert "the score network" in said and "img_resolution 8, not 64" in said and "use another --preset" in said
    bundle = _with(bundle, "reference", SMALL | {"model_channels": 32})
    assert "the reference network" in (said := _refusal(bundle, tmp_path / "out", NAME))
    assert "model_channels 32, not 16" in said
    assert "the kind EDMPrecond, not EDM2Precond" in _refusal(bundles.read("mnist32"), tmp_path / "out", NAME)


def test_preset_that_is_unknown_lists_the_known_ones(bundle: Bundle, tmp_path: Path) -> None:
    said = _refusal(bundle, tmp_path / "out", "edm2-img512-s-autog")
    assert "unknown preset 'edm2-img512-s-autog'" in said and all(name in said for name in presets.PRESETS)


@pytest.mark.usefixtures("small_presets")
def test_preset_notes_another_average_of_the_same_network() -> None:
    provenance = "score: converted from edm2-img512-s-2147483-0.130.pkl; reference: converted from mine.pkl"
    (note,) = presets.other_files("edm2-img512-s-autog-fid", provenance)
    assert "edm2-img512-s-2147483-0.070.pkl as score" in note and "edm2-img512-s-2147483-0.130.pkl" in note
    assert not [*presets.other_files("edm2-img512-s-fid", provenance)]


@pytest.mark.usefixtures("small_presets")
def test_one_step_takes_no_preset(bundle: Bundle, tmp_path: Path) -> None:
    result = draw(bundle.folder, tmp_path / "out", "--preset", NAME, "--one-step")
    assert result.exit_code == 2 and "--preset" in result.output
