"""`dgfast train discriminator` and `--start`: any bundle, folders, latents, both objectives, and wrong input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dgfast import bundle as bundles
from dgfast import nets, networks
from dgfast.config import GuidanceConfig
from tests.doors.test_train import _train

_SIDE, _CLASSES = 8, 2
_SCORE = {
    "img_resolution": _SIDE, "model_type": "SongUNet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [], "sigma_data": 0.5,
}  # fmt: skip
_OWN = '{"model_channels": 8, "channel_mult": [1, 2], "num_head_channels": 8, "attention_resolutions": []}'
_SHORT = ("--images", "32", "--sigma-min", "0.05", "--sigma-max", "5", "--net", _OWN, "--trunk", "own")


def bundle_of(folder: Path, channels: int, classes: int) -> Path:
    """A bundle with a score network alone."""
    torch.manual_seed(0)
    keywords = _SCORE | {"img_channels": channels, "label_dim": classes}
    bundle = bundles.read_or_new(folder)
    bundles.write(bundles.with_net(bundle, "score", nets.build("EDMPrecond", **keywords), "EDMPrecond", keywords))
    return folder


def pictures(folder: Path, count: int = 40, side: int = _SIDE, classes: int = _CLASSES) -> Path:
    """PNGs of random grey, in a folder a class."""
    rng = np.random.default_rng(side)
    for index in range(count):
        place = folder / f"class-{index % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(place / f"{index:03}.png")
    return folder


def test_train_discriminator_of_its_own_guides_without_a_classifier(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", channels=1, classes=_CLASSES)
    real, fakes = pictures(tmp_path / "real"), pictures(tmp_path / "fakes", count=30)
    for objective in ("cross-entropy", "kl"):
        result = _train(
            "discriminator", bundle, real, "--generated", str(fakes), "--objective", objective, "--overwrite", *_SHORT
        )
        assert result.exit_code == 0, result.output
        (bundle / "training/discriminator/state.pt").unlink()
    done = bundles.read(bundle)
    assert set(done.metrics["discriminator"]["held_out_by_sigma"]["1"]) == {"accuracy", "loss", "denoising"}
    loaded = networks.load(bundle, guidance=GuidanceConfig(dg_weight=1.0))
    assert loaded.discriminator is not None and loaded.classifier is None
    logit = loaded.discriminator(torch.zeros(2, 1, _SIDE, _SIDE), torch.ones(2), torch.eye(_CLASSES))
    assert logit.shape == (2,) and bool(logit.isfinite().all())


def test_train_discriminator_of_latents_without_classes(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", channels=4, classes=0)
    rng = np.random.default_rng(0)
    for name, count in (("real", 40), ("fakes", 30)):
        (tmp_path / name).mkdir()
        latents = rng.normal(size=(count, 4, _SIDE, _SIDE)).astype(np.float32)
        labels = np.full(count, -1)
        np.savez(tmp_path / name / "latents-00000.npz", latents=latents, labels=labels)
    result = _train("discriminator", bundle, tmp_path / "real", "--generated", str(tmp_path / "fakes"), *_SHORT)
    assert result.exit_code == 0, result.output
    keywords = bundles.read(bundle).spec("discriminator").keywords
    assert (keywords["in_channels"], keywords["image_size"], keywords["num_classes"]) == (4, _SIDE, 0)


@pytest.mark.parametrize(
    ("fakes", "message"),
    [
        ({"count": 4}, "4 generated images and 20 to train on"),
        ({"side": 6}, "images of 6 x 6 x 1 (height, width, channels); the score network makes 8 x 8 x 1"),
        ({"classes": 0}, "30 of 30 images have no label"),
        ({"classes": 3}, "3 folders of classes, of which the score network has 2"),
    ],
    ids=["few", "size", "unlabelled", "classes"],
)
def test_train_discriminator_bad_input_is_one_line(tmp_path: Path, fakes: dict[str, int], message: str) -> None:
    bundle = bundle_of(tmp_path / "bundle", channels=1, classes=_CLASSES)
    folder = pictures(tmp_path / "fakes", **{"count": 30, **fakes})
    result = _train("discriminator", bundle, pictures(tmp_path / "real"), "--generated", str(folder), *_SHORT)
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output
    assert set(bundles.read(bundle).nets) == {"score"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trunk", "classifier"], "has no classifier whose features a discriminator could read"),
        (["--batch", "1"], "half of each batch is real"),
        (["--sigma-max", "inf"], "both finite"),
        (["--patience", "0"], "--patience 0 must be 1 check at least"),
        (["--holdout", "39"], "30 generated images and 1 to train on"),
        (["--generated", "mnist"], "--generated mnist: no such file or folder"),
        (["--net", '{"num_head_channels": 5}'], "do not split into heads"),
        (["--net", '{"in_channels": 3}'], "does not go through this network for images of 8 x 8 x 1"),
    ],
    ids=["trunk", "batch", "sigma", "patience", "holdout", "generated", "build", "channels"],
)
def test_train_discriminator_bad_options_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    bundle = bundle_of(tmp_path / "bundle", channels=1, classes=_CLASSES)
    real, fakes = pictures(tmp_path / "real"), pictures(tmp_path / "fakes", count=30)
    result = _train("discriminator", bundle, real, "--generated", str(fakes), *_SHORT, *options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output
    assert not (bundle / "training").exists()


def test_train_discriminator_takes_samples_of_its_own_score_network_alone(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", channels=1, classes=_CLASSES)
    real, fakes = pictures(tmp_path / "real"), tmp_path / "fakes"
    fakes.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, _SIDE, _SIDE, 1), dtype=np.uint8)
    np.savez(fakes / "images-0.npz", images=images, labels=np.arange(20) % _CLASSES)
    for drawn_by, code in (("of another", 2), (bundles.read(bundle).fingerprint(["score"]), 0)):
        (fakes / "manifest.json").write_text(json.dumps({"images": 20, "job": {"weights": drawn_by}}))
        result = _train("discriminator", bundle, real, "--generated", str(fakes), *_SHORT)
        assert result.exit_code == code, result.output
        assert ("others drew it than the score network" in result.output) == bool(code)
    (bundle / "training/discriminator/state.pt").unlink()
    before = (bundle / "discriminator.safetensors").read_bytes()
    result = _train("discriminator", bundle, real, "--generated", str(fakes), *_SHORT)
    assert result.exit_code == 2 and "give --overwrite to replace it" in result.output
    assert (bundle / "discriminator.safetensors").read_bytes() == before


def test_train_refuses_pictures_of_different_sizes(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "real")
    Image.new("L", (5, 5)).save(folder / "class-0" / "small.png")
    result = _train("features", tmp_path / "bundle", folder, "--images", "8")
    assert result.exit_code == 2 and "images of different sizes or channels" in result.output


def test_train_start_goes_on_from_a_bundle(tmp_path: Path) -> None:
    start = bundle_of(tmp_path / "start", channels=1, classes=_CLASSES)
    data = pictures(tmp_path / "real")
    options: tuple[Any, ...] = ("--start", str(start), "--images", "8", "--lr", "1e-9", "--ema-rel", "0.1")
    result = _train("score", tmp_path / "bundle", data, *options, "--p-mean", "-0.8", "--p-std", "1.4")
    assert result.exit_code == 0, result.output
    before, after = (dict(bundles.read(path).load("score").named_parameters()) for path in (start, tmp_path / "bundle"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    schedule = torch.load(tmp_path / "bundle/training/score/state.pt", weights_only=True)["schedule"]
    assert (schedule["p_mean"], schedule["p_std"], schedule["start"]) == (-0.8, 1.4, str(start))
    for extra, message in ((["--net", '{"dropout": 0.1}'], "exclude each other"), ([], "these data are for a")):
        other = data if extra else pictures(tmp_path / "larger", side=16)
        result = _train("score", tmp_path / "bundle", other, *options, *extra)
        assert result.exit_code == 2 and message in result.output.splitlines()[-1], result.output


def test_train_power_function_and_the_verdict_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgfast.training import against_generated

    monkeypatch.setattr(against_generated, "verdict", lambda judged, divergence: "nothing to see")
    bundle = bundle_of(tmp_path / "bundle", channels=1, classes=_CLASSES)
    real, fakes = pictures(tmp_path / "real"), pictures(tmp_path / "fakes", count=30)
    result = _train("discriminator", bundle, real, "--generated", str(fakes), *_SHORT, "--ema-rel", "0.1")
    assert result.exit_code == 0 and "Note: nothing to see" in result.output
    assert json.loads((bundle / "bundle.json").read_text())["guidance"] == {"dg_weight": 1.0}
    result = _train("discriminator", bundle, real, "--generated", str(fakes), *_SHORT, "--ema-rel", "0.5")
    assert result.exit_code == 2 and "relative width between 0 and 0.289" in result.output.splitlines()[-1]
