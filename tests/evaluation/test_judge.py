"""Rows, differences and ranges of seeds, through the command: against scipy and numpy on the same features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from click.testing import CliRunner, Result

from dgfast.evaluate import main
from tests.evaluation.conftest import Folder, Plain, features_of, noise, saved, seeded


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def _judged(tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], Result]:
    result = _run(*arguments, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "report.json").read_text()), result


def _frechet(drawn: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    own = np.cov(drawn.T)
    root = np.real(scipy.linalg.sqrtm(own @ covariance))
    return float(np.square(drawn.mean(0) - mean).sum() + np.trace(own + covariance - 2 * root))


@pytest.fixture
def moments(tmp_path: Path) -> Path:
    real = features_of(noise(60, seed=9, most=200))
    np.savez(tmp_path / "ref.npz", mu=real.mean(0), sigma=np.cov(real.T))
    return tmp_path / "ref.npz"


def test_rows_of_ranges_and_their_differences_are_scipys(
    tmp_path: Path, folder: Folder, detector: Path, moments: Path
) -> None:
    """Two folders on the same seeds, in two ranges; the second one's images come in another order."""
    one, other = noise(40), noise(40, seed=1, most=220)
    reference = dict(np.load(moments))
    first, second = folder("one", one), folder("other", other)
    order = np.random.default_rng(0).permutation(40)
    np.savez(second / "images-00000.npz", images=other[order], seeds=order, labels=order)
    options = ("--features", detector, "--reference", moments, "--seed-ranges", "0-19,20-39", "--bootstrap", 40)
    content, result = _judged(tmp_path, first, second, *options)
    assert content["format"] == "dgfast-evaluation-1" and content["reference"] == {"name": str(moments), "images": None}
    assert content["features"].startswith("inception.pt (sha256 ")
    rows = {row["name"]: row for row in content["rows"]}
    values: dict[str, float] = {}
    for path, images in ((first, one), (second, other)):
        for low, high in ((0, 19), (20, 39)):
            name = f"{path} seeds {low}-{high}"
            values[name] = _frechet(features_of(images[low : high + 1]), reference["mu"], reference["sigma"])
            row, frechet = rows[name], rows[name]["metrics"]["frechet"]
            assert frechet["value"] == pytest.approx(values[name], rel=1e-4)
            assert frechet["low"] < frechet["value"] < frechet["high"] and set(row["metrics"]) == {"frechet"}
            assert (row["images"], row["seeds"], row["folder"]) == (20, f"{low}-{high}", str(path))
            assert row["settings"] == {"bundle": path.name}
            assert ("difference" in row) == (path is second)
    difference = rows[f"{second} seeds 20-39"]["difference"]
    assert difference["against"] == f"{first} seeds 20-39"
    assert difference["frechet"]["value"] == pytest.approx(
        values[f"{second} seeds 20-39"] - values[f"{first} seeds 20-39"], rel=1e-3
    )
    groups = {group["name"]: group for group in content["seed_ranges"]}
    own = [values[f"{second} seeds 0-19"], values[f"{second} seeds 20-39"]]
    assert groups[str(second)]["lowest"]["frechet"] == pytest.approx(min(own), rel=1e-4)
    assert groups[str(second)]["mean"]["frechet"] == pytest.approx(sum(own) / 2, rel=1e-4)
    assert f"{second} lowest" in result.stdout and "less" in result.stdout


def test_a_paired_interval_is_numpys_on_the_same_resamples(
    tmp_path: Path, folder: Folder, detector: Path, moments: Path
) -> None:
    one, other = noise(30), noise(30, seed=1, most=220)
    reference = dict(np.load(moments))
    paths = folder("one", one), folder("other", other)
    content, _ = _judged(tmp_path, *paths, "--features", detector, "--reference", moments, "--bootstrap", 50)
    generator = np.random.default_rng(0)
    picks = [generator.integers(0, 30, 30) for _ in range(50)]
    f, g = features_of(one), features_of(other)
    apart = np.array([_frechet(g[i], **_as(reference)) - _frechet(f[i], **_as(reference)) for i in picks])
    value = _frechet(g, **_as(reference)) - _frechet(f, **_as(reference))
    low, high = np.quantile(apart - apart.mean() + value, [0.025, 0.975])
    found = content["rows"][1]["difference"]["frechet"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((value, low, high), rel=1e-3)


def _as(reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"mean": reference["mu"], "covariance": reference["sigma"]}


def test_without_equal_seeds_there_is_no_difference(
    tmp_path: Path, folder: Folder, detector: Path, moments: Path
) -> None:
    options = ("--features", detector, "--reference", moments)
    content, result = _judged(tmp_path, folder("one", noise(9)), folder("other", noise(9), first=9), *options)
    assert all("difference" not in row for row in content["rows"]) and "less" not in result.stdout
    content, result = _judged(tmp_path, tmp_path / "one", folder("same", noise(9)), *options, "--bootstrap", 0)
    assert content["rows"][0]["metrics"]["frechet"]["low"] is None and "intervals" not in result.output
    assert all("difference" not in row for row in content["rows"])


def test_what_makes_rows_hard_to_compare_is_said(tmp_path: Path, folder: Folder, detector: Path, moments: Path) -> None:
    """Fewer images than numbers a feature has, other numbers of images, and other classes on equal seeds."""
    options = ("--features", detector, "--reference", moments)
    one, other, few = folder("one", noise(9)), folder("other", noise(9, seed=1)), folder("few", noise(6))
    np.savez(other / "images-00000.npz", images=noise(9, seed=1), seeds=np.arange(9), labels=np.arange(9))
    said = _judged(tmp_path, one, other, few, *options)[1].stderr
    assert "frechet: 6 images are few for features of 6 numbers; take more than that" in said
    assert "frechet: rows of 6 to 9 images; compare it between equal numbers only" in said
    assert f"{other}: on the seeds of {one}, but of other classes; the difference is one of these, too" in said
    said = _judged(tmp_path, one, folder("alike", noise(9, seed=2)), *options)[1].stderr
    assert "classes" not in said and "few" not in said and "equal numbers" not in said


def test_folders_may_be_the_ranges(tmp_path: Path, folder: Folder, detector: Path, moments: Path) -> None:
    paths = folder("one", noise(9)), folder("other", noise(9, seed=1), first=9)
    options = ("--features", detector, "--reference", moments, "--seed-ranges", "folders")
    content, result = _judged(tmp_path, *paths, *options)
    values = [row["metrics"]["frechet"]["value"] for row in content["rows"]]
    (group,) = content["seed_ranges"]
    assert group["lowest"] == {"frechet": min(values)} and group["mean"]["frechet"] == pytest.approx(sum(values) / 2)
    assert "\nlowest" in result.stdout and "\nmean" in result.stdout


def test_images_are_a_reference_for_every_metric_and_a_subset_is_told(
    tmp_path: Path, folder: Folder, detector: Path
) -> None:
    real, drawn = folder("real", noise(30, seed=5)), folder("drawn", noise(25))
    content, result = _judged(tmp_path, drawn, "--features", detector, "--reference", real, "--subset", 20)
    (row,) = content["rows"]
    assert set(row["metrics"]) == {"frechet", "kernel", "precision", "recall", "density", "coverage"}
    f, g = features_of(noise(30, seed=5)), features_of(noise(25))
    assert row["metrics"]["frechet"]["value"] == pytest.approx(_frechet(g, f.mean(0), np.cov(f.T)), rel=1e-4)
    assert content["reference"] == {"name": str(real), "images": 30} and content["subset"] == 20
    assert "kernel, precision, recall, density, coverage: of 20 images of each side at most" in result.stderr
    same, _ = _judged(tmp_path, real, "--features", detector, "--reference", real, "--metrics", "frechet,coverage")
    assert same["rows"][0]["metrics"]["coverage"]["value"] == 1 and len(same["rows"][0]["metrics"]) == 2


def test_moments_are_those_of_all_images_where_only_some_features_are_kept(
    tmp_path: Path, folder: Folder, detector: Path, moments: Path
) -> None:
    """Without a bootstrap no more than the subset's features are in memory."""
    path = folder("drawn", noise(40))
    options = ("--features", detector, "--reference", moments)
    few, _ = _judged(tmp_path, path, *options, "--bootstrap", 0, "--subset", 7)
    every, _ = _judged(tmp_path, path, *options, "--bootstrap", 40)
    assert few["rows"][0]["metrics"]["frechet"]["value"] == every["rows"][0]["metrics"]["frechet"]["value"]


def test_a_wrong_reference_is_all_that_is_said(tmp_path: Path, folder: Folder, detector: Path) -> None:
    """Before the notes, and before any image is judged."""
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2), sigma=np.eye(2))
    result = _run(folder("drawn", noise(9)), "--features", detector, "--reference", tmp_path / "ref.npz")
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "those of 2; exactly one" in result.output


def test_a_metric_that_overflows_is_one_line(tmp_path: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.evaluation.judge.kernel_distance", lambda *_: float("nan"))
    options = ("--features", saved(seeded(Plain), tmp_path / "net.pt"), "--features-range", "0,1")
    result = _run(folder("drawn", noise(9)), *options, "--reference", folder("real", noise(9, seed=1)))
    assert result.exit_code == 2 and "kernel is not a finite number: features of net.pt" in result.output


# Mistakes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--reference ref.npz --data mnist", "--reference and --data or --holdout are two references; give one"),
        ("--features-size 8", "--features-range and --features-size say what the file of --features reads"),
        ("--features inception.pt --reference none.npz", "--reference none.npz: no such file or folder"),
        ("--features inception.pt --reference ref.npz --metrics recall", "--metrics recall: it needs images of the"),
        ("--features inception.pt --reference ref.npz --metrics fid", "--metrics 'fid': there are frechet, kernel"),
        ("--features inception.pt --reference ref.npz --metrics log_ratio", "log_ratio: it is that of a bundle's"),
        ("--features inception.pt --reference ref.npz --seed-ranges 0-99", "holds 9 images of the 100 seeds 0-99"),
        ("--features inception.pt --reference ref.npz --seed-ranges 3-3", "--seed-ranges 3-3: 1 images; 2 at least"),
        ("--features inception.pt --reference ref.npz ./drawn", "drawn is given twice; give it once"),
        ("--features inception.pt --reference ref.npz --bootstrap 1", "--bootstrap 1: no 95 % interval can be told"),
        ("--features inception.pt --reference ref.npz --bootstrap 39", "give 40 at least, better 200, or 0 for none"),
        ("--features inception.pt --reference ref.npz --metrics ,", "--metrics '': there are frechet, kernel"),
        ("--features inception.pt --reference real", "real: 3 images; 7 at least can be compared by frechet, kernel"),
        ("--features inception.pt --reference grey", "drawn: these are 3 x 8 x 8 images, and those of grey are 1 x 8"),
        ("--features inception.pt --reference ref.npz grey", "grey: these are 1 x 8 x 8 images, and those of drawn"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    options: str, complaint: str, tmp_path: Path, folder: Folder, detector: Path, moments: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder("drawn", noise(9))
    folder("real", noise(3))
    folder("grey", noise(9, channels=1))
    monkeypatch.chdir(tmp_path)
    Path("inception.pt").write_bytes(detector.read_bytes())
    result = _run("drawn", *options.split())
    assert result.exit_code == 2 and complaint in result.output and result.output.count("\n") == 1, result.output


@pytest.mark.parametrize("ranges", ["5-3", "a-b", "0-9,", "3", "0-" + "9" * 30])
def test_ranges_that_are_none_are_refused(ranges: str) -> None:
    result = _run("drawn", "--seed-ranges", ranges)
    assert result.exit_code == 2 and "expected ranges such as 0-49999,50000-99999, or folders" in result.output


def test_a_seed_in_two_ranges_is_refused() -> None:
    result = _run("drawn", "--seed-ranges", "5-9,0-3,3-4")
    assert result.exit_code == 2 and "seed 3 stands in two ranges" in result.output


def test_ranges_need_seeds(tmp_path: Path, detector: Path, moments: Path) -> None:
    np.savez(tmp_path / "adm.npz", arr_0=noise(9))
    result = _run(tmp_path / "adm.npz", "--features", detector, "--reference", moments, "--seed-ranges", "0-3")
    assert result.exit_code == 2 and "nothing tells the seeds of" in result.output and result.output.count("\n") == 1
