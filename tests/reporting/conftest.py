"""Folders and files that tell of some runs, and the page of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from dgfast.config import GuidanceConfig
from dgfast.report import main
from tests.support.paths import ROOT
from tests.support.reporting import HOSTILE, clipped, evaluation, judged, noise_errors, run_folder

_RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores.json"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """(arguments) -> the page that `dgfast report` makes of them in `tmp_path`, where it runs."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: _made(*arguments, out=Path("page"))


def _made(*arguments: str | Path, out: Path) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return (out / "index.html").read_text()


@dataclass(frozen=True)
class Whole:
    """A page with every section but that of trajectories.

    Attributes:
        inputs: what it was made of, folders first. text: of its HTML. folder: where it lies.
        clipped: texts of each figure of matplotlib's that reach over its edge.
    """

    inputs: list[Path]
    text: str
    folder: Path
    clipped: list[list[str]]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    inputs = _inputs(tmp_path_factory.mktemp("inputs"))
    out, figures, save = tmp_path_factory.mktemp("page") / "page", list[Figure](), Figure.savefig

    def keeping(figure: Figure, *arguments: Any, **keywords: Any) -> None:
        figures.extend([figure] if figure not in figures else [])
        save(figure, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keeping)
        text = _made(*inputs, out=out)
    yield Whole(inputs, text, out, [clipped(figure) for figure in figures])


def _inputs(folder: Path) -> list[Path]:
    hostile = HOSTILE.replace("/", "")  # no part of a folder's name
    runs = [
        run_folder(folder / "plain", guidance=GuidanceConfig(), seconds=4.0),
        run_folder(folder / "dg", guidance=GuidanceConfig(dg_weight=2.0), seconds=8.0, runtime="compiled"),
        run_folder(folder / hostile, guidance=GuidanceConfig(cfg_scale=3.0), steps=9, seconds=2.0),
        run_folder(folder / "one-step", seconds=0.5),
        run_folder(folder / "other-seeds", seeds="100-115", guidance=GuidanceConfig(), seconds=None),
    ]
    difference = {"against": "plain", "frechet": {"value": -0.0625, "low": -0.09375, "high": -0.03125}}
    rows = [
        judged("training images", None, 0.046875, images=2000),
        judged("plain", "plain", 0.3125),
        judged(HOSTILE, hostile, 0.40625),
        judged("dg", "dg", 0.25, difference=difference),
        judged("one step", "one-step", 0.5),
        judged("timeless", "other-seeds", 0.34375),
    ]
    measured = json.loads(_RESULTS.read_text())
    measured["benchmarks"] = [row for row in measured["benchmarks"] if "mnist32" in row["name"]]
    measured["benchmarks"][-1]["name"] = HOSTILE
    (folder / "times.json").write_text(json.dumps(measured))
    judgement, errors = evaluation(folder / "quality.json", rows), noise_errors(folder / "results.json")
    return [*runs, judgement, errors, folder / "times.json"]
