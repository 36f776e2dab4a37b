"""The door `dgfast report`: what `dgfast sample` wrote is on the page, and mistakes take one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.report import main
from dgfast.reporting import trajectory
from tests.support.reporting import evaluation, judged, noise_errors, run_folder
from tests.support.sample import draw


def _run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    return result.exit_code, result.output


def _refused(*arguments: str | Path) -> str:
    code, output = _run(*arguments)
    assert code == 2 and output.count("\n") == 1 and output.startswith("Error: "), output
    return output


def test_report_of_folders_as_sample_writes_them(tiny: Path, tmp_path: Path) -> None:
    formats = {"npz": "--format=npz", "png": "--format=png", "adm": "--format=adm"}
    for name, form in formats.items():
        assert draw(tiny, tmp_path / name, form, "--dg-weight", "1").exit_code == 0
    code, output = _run(*(tmp_path / name for name in formats), "--out", tmp_path / "page")
    assert code == 0, output
    page = (tmp_path / "page" / "index.html").read_text()
    run = json.loads((tmp_path / "npz" / "manifest.json").read_text())["runs"][0]
    assert f"{run['images'] / run['seconds']:.3g} (in {run['seconds']:.1f} s)" in page
    assert "dg_weight 1.0" in page and "discriminator guidance" in page and "not to be compared" not in page
    grids = {(tmp_path / "page" / f"grid-{k}.png").read_bytes()[-2000:] for k in (1, 2)}
    assert len(grids) == 1, "the same images, in whichever format they are kept"


def test_trajectory_is_drawn_shown_kept_and_shown_again(tiny: Path, tmp_path: Path) -> None:
    drawn, again = tmp_path / "drawn", tmp_path / "again"
    options = ["--seeds", "5-6", "--labels", "2", "--steps", "3", "--solver", "euler", "--dg-weight", "0.5"]
    code, output = _run("--trajectory", tiny, *options, "--out", drawn)
    assert code == 0, output
    page = (drawn / "index.html").read_text()
    for text in ("tiny: ", "solver euler", "num_steps 3", "dg_weight 0.5", "of the seeds 5-6"):
        assert text in page
    with np.load(drawn / "trajectory.npz") as kept:
        assert kept["guided"].shape == (4, 2, 8, 8, 1) and kept["labels"].tolist() == [2, 2]
    assert _run(drawn / "trajectory.npz", "--out", again)[0] == 0
    for name in ("trajectories-1.png", "corrections-1.png"):
        assert (again / name).read_bytes() == (drawn / name).read_bytes()
    assert not (again / "trajectory.npz").exists()


def test_steps_of_a_bundle_in_discrete_time_are_its_timesteps(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[SamplingConfig]()
    monkeypatch.setattr(trajectory, "record", lambda bundle, sampling, *_: asked.append(sampling))
    respaced = shutil.copytree(tiny, tmp_path / "respaced")
    description = json.loads((tiny / "bundle.json").read_text()) | {"sampling": {"respacing": "250"}}
    (respaced / "bundle.json").write_text(json.dumps(description))
    for bundle in (tiny, respaced):
        _run("--trajectory", bundle, "--steps", "4", "--out", tmp_path / "page")
    assert [(sampling.num_steps, sampling.respacing) for sampling in asked] == [(4, None), (4, "4")]


_PARTS = '{"parts": {"parity by noise level": {"rows": [%s]}}}'


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", "{", "is no JSON that dgfast reads"),
        ("a.json", "[1]", "is none of the files that this page is made of"),
        ("a.json", '{"benchmarks": [{}]}', "is not a result of pytest-benchmark"),
        ("a.json", '{"parts": {}}', 'has no rows of "parity by noise level"'),
        ("a.json", _PARTS % '{"sigma, error of the call": "x"}', "is no results.json of"),
        ("a.json", '{"format": "dgfast-evaluation-1"}', "is no whole file of `dgfast evaluate --json`"),
        ("a.npz", "PK", "is no trajectory that"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_one_line(name: str, content: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert line in _refused(tmp_path / name, "--out", tmp_path / "page")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("value", ["0.5", None, True, {}])
def test_a_metric_that_is_no_number_is_one_line(value: object, tmp_path: Path) -> None:
    row = judged("a", "a", 0.5) | {"metrics": {"frechet": {"value": value, "low": None, "high": None}}}
    assert "frechet" in _refused(evaluation(tmp_path / "e.json", [row]), "--out", tmp_path / "page")


@pytest.mark.parametrize(
    "change",
    [
        {"name": 5}, {"images": "16"}, {"images": -1}, {"folder": "a\0b"}, {"settings": {"job": 5}},
        {"metrics": {"frechet": {"value": 10**400}}}, {"metrics": {"frechet": {"value": 1e308}}},
        {"metrics": {"frechet": {"value": 1, "low": 2, "high": 0}}},
    ],
)  # fmt: skip
def test_a_row_that_somebody_edited_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    path = evaluation(tmp_path / "e.json", [judged("a", "a", 0.5) | change])
    assert "is no whole file of `dgfast evaluate --json`" in _refused(path, "--out", tmp_path / "page")


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"images": np.zeros((16, 8, 8), np.uint8)}, r"found uint8 [16, 8, 8]"),
        ({"images": np.zeros((16, 8, 8, 1))}, "found float64 [16, 8, 8, 1]"),
        ({"images": np.zeros((16, 0, 8, 1), np.uint8)}, "found uint8 [16, 0, 8, 1]"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8), "seeds": np.arange(0)}, "found uint8 [0, 8, 8, 1]"),
        ({"labels": np.zeros(3, np.int64)}, "labels must be one whole number an image; found [3]"),
        ({"labels": np.array(["a"] * 16)}, "labels must be one whole number an image"),
    ],
)
def test_a_shard_of_something_else_is_one_line(arrays: dict[str, np.ndarray], line: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", guidance=GuidanceConfig())
    with np.load(run / "images-00000.npz") as stored:
        whole = dict(stored)
    np.savez(run / "images-00000.npz", **{**whole, **arrays})
    assert line in _refused(run, "--out", tmp_path / "page")


def test_folders_that_are_no_jobs_are_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "page")
    assert "cannot read" in _refused(tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    assert "empty has no manifest.json: give a folder that `dgfast sample" in _refused(tmp_path / "empty", *out)
    for content in (
        "{",
        "{}",
        '{"job": {"seeds": "x"}, "runs": [], "images": 1}',
        '{"job": 3, "runs": [], "images": 1}',
    ):
        (tmp_path / "empty" / "manifest.json").write_text(content)
        assert "is no manifest of `dgfast sample`" in _refused(tmp_path / "empty", *out)
    run = run_folder(tmp_path / "run", guidance=GuidanceConfig())
    assert "is given twice" in _refused(run, tmp_path / "empty" / ".." / "run", *out)
    np.savez(run / "images-00000.npz", images=np.zeros((16, 8, 8, 1), np.uint8), labels=np.zeros(16))
    assert "no images with their seeds" in _refused(run, *out)
    (run / "images-00000.npz").write_text("no zip")
    assert "not a file of images" in _refused(run, *out)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    results = noise_errors(tmp_path / "results.json")
    run = run_folder(tmp_path / "run", guidance=GuidanceConfig())
    assert "already holds images-00000.npz" in _refused(results, "--out", run)
    assert "is a file; name a new folder" in _refused(results, "--out", results)
    (tmp_path / "full").write_text("")
    code, output = _run(results, "--out", tmp_path / "full" / "page")
    assert code == 4 and "can't be written" in output and output.count("\n") == 1


def test_report_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dgfast.reporting.page.write", stopped)
    code, output = _run(noise_errors(tmp_path / "results.json"), "--out", tmp_path / "page")
    assert code == 130 and output == "stopped before the page was whole; the same command makes it anew\n"


def test_options_of_a_trajectory_want_one() -> None:
    assert "--seeds, --dg-weight goes with --trajectory BUNDLE" in _refused("--dg-weight", "1", "--seeds", "1")
    assert "nothing to report" in _refused()
    assert "no guidance acts" in _refused("--trajectory", "mnist32", "--dg-weight", "0")
