"""The door `python -m dgfast.sample`: every option does something."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dgfast.sample import main
from tests.support.sample import draw, images_of, manifest_of


def test_sample_writes_grid_shards_and_manifest(tiny: Path, tmp_path: Path) -> None:
    result = draw(tiny, tmp_path / "out", "--batch", "3", "--labels", "2,0", "--dg-weight", "1")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (16, 16)
    shards = []
    for path in sorted((tmp_path / "out").glob("*.npz")):
        with np.load(path) as file:
            shards.append(dict(file))
    assert [shard["seeds"].tolist() for shard in shards] == [[0, 1, 2], [3]]
    assert [shard["labels"].tolist() for shard in shards] == [[2, 0, 2], [0]]
    assert all(shard["images"].dtype == np.uint8 and shard["images"].shape[1:] == (8, 8, 1) for shard in shards)
    manifest = manifest_of(tmp_path / "out")
    (run,) = manifest["runs"]
    assert manifest["job"]["seeds"] == "0-3" and manifest["job"]["labels"] == "2,0" and run["score_evaluations"] == 5
    assert run["guidance_gradients"] == run["guided_calls"] == 2  # the third level lies below the window
    assert manifest["job"]["guidance"]["dg_weight"] == 1.0 and run["seconds"] > 0
    last = result.output.strip().splitlines()[-1]
    assert "4 images" in last and "images/s" in last and "5 score evaluations and 2 guidance gradients" in last


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "5"], ["--solver", "euler"], ["--solver", "dpmpp-2m"], ["--solver", "ddpm"],
        ["--solver", "ddim"], ["--solver", "ddim", "--eta", "1"], ["--solver", "ddpm", "--fixed-variance", "large"],
        ["--dg-weight", "5", "--dg-schedule", "0.5:0,0.9:1"],
        ["--classifier-scale", "5", "--classifier-schedule", "0.2:1,0.9:3"], ["--grid", "ve"], ["--grid", "iddpm"],
        ["--schedule", "ve"], ["--scaling", "vp"], ["--sigma-min", "0.1"], ["--sigma-max", "20"], ["--rho", "3"],
        ["--alpha", "0.5"], ["--s-churn", "2"], ["--labels", "1"], ["--dg-weight", "5"],
        ["--dg-weight-2nd", "5"], ["--classifier-scale", "5"], ["--cfg-scale", "2"], ["--autoguidance", "2"],
        ["--diversity", "5"], ["--fidelity", "5"],
        ["--dtype", "bf16"], ["--seeds", "10-13"],
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_sample_every_option_changes_the_images(
    tiny: Path, plain: np.ndarray, tmp_path: Path, options: list[str]
) -> None:
    result = draw(tiny, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert not np.array_equal(images_of(tmp_path / "out"), plain)


@pytest.mark.parametrize(
    ("base", "option"),
    [
        (["--s-churn", "2"], ["--s-noise", "1.5"]),
        (["--s-churn", "2"], ["--s-min", "10"]),
        (["--s-churn", "2"], ["--s-max", "10"]),
        (["--dg-weight", "5"], ["--dg-window", "0.5,1"]),
        (["--dg-weight", "5"], ["--boosting"]),
        (["--dg-weight", "5"], ["--dg-every", "2"]),
        (["--dg-weight", "5", "--dg-every", "2"], ["--dg-reuse", "linear"]),
        (["--dg-weight", "5", "--dg-window", "0.541,1", "--boosting", "--steps", "12"], ["--published-window"]),
        (["--cfg-scale", "3"], ["--guidance-interval", "0.5,10"]),
        (["--diversity", "3"], ["--perceptual"]),
        (["--diversity", "3"], ["--normalize", "sample_l2"]),
        (["--diversity", "3"], ["--target-class", "1"]),
        (["--fidelity", "3"], ["--clean-time", "0"]),
        (["--fidelity", "3"], ["--base-class", "1"]),
    ],
    ids=lambda options: " ".join(options),
)
def test_sample_options_of_options_change_the_images(
    tiny: Path, tmp_path: Path, base: list[str], option: list[str]
) -> None:
    for name, options in (("without", base), ("with", base + option)):
        result = draw(tiny, tmp_path / name, "--steps", "6", "--seeds", "0-15", *options)
        assert result.exit_code == 0, result.output
    assert not np.array_equal(images_of(tmp_path / "without"), images_of(tmp_path / "with"))


def test_sample_batch_size_leaves_the_images_alone(tiny: Path, plain: np.ndarray, tmp_path: Path) -> None:
    assert draw(tiny, tmp_path / "out", "--batch", "1").exit_code == 0
    assert np.abs(images_of(tmp_path / "out").astype(int) - plain).max() <= 1


def test_sample_bundle_defaults_hold_unless_overridden(tiny: Path, tmp_path: Path) -> None:
    described = json.loads((tiny / "bundle.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny.glob("*.safetensors"):
        (copy / path.name).write_bytes(path.read_bytes())
    described |= {"sampling": {"num_steps": 4}, "guidance": {"dg_weight": 2.0, "dg_window": [0.1, 1.0]}}
    (copy / "bundle.json").write_text(json.dumps(described))
    base = ["--bundle", str(copy), "--seeds", "0", "--device", "cpu"]
    assert CliRunner().invoke(main, [*base, "--out", str(tmp_path / "a")]).exit_code == 0
    assert CliRunner().invoke(main, [*base, "--dg-weight", "0", "--out", str(tmp_path / "b")]).exit_code == 0
    assert manifest_of(tmp_path / "a")["job"]["sampling"]["num_steps"] == 4
    assert manifest_of(tmp_path / "a")["job"]["guidance"]["dg_weight"] == 2.0
    assert manifest_of(tmp_path / "b")["runs"][0]["guidance_gradients"] == 0
