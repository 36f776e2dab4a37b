"""The page says what the files say, in their order, as text, and asks nobody for anything."""

import base64
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgfast.config import GuidanceConfig
from dgfast.reporting.markup import Html, joined, table, tag
from tests.reporting.conftest import Whole
from tests.support.reporting import HOSTILE, evaluation, judged, run_folder


class _Reader(HTMLParser):
    """Elements with their attributes, cells by table, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._path: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self._path.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "thead":
            self.tables[self._caption] = []
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop() == tag, "every element ends where it must"

    def handle_data(self, data: str) -> None:
        data = data.replace("\xa0", " ")
        if "style" in self._path:
            return
        self.text += data
        if "caption" in self._path:
            self._caption += data
        elif {"td", "th"} & {*self._path}:
            self.tables[self._caption][-1][-1] += data


def _column(rows: list[list[str]], heading: str) -> list[str]:
    at = rows[0].index(heading)
    return [row[at] for row in rows[1:]]


def test_numbers_are_those_of_the_files_in_their_order(whole: Whole) -> None:
    page = _Reader(whole.text)
    runs = page.tables["Runs with their settings"]
    assert _column(runs, "folder") == [f"{k}. {path}" for k, path in enumerate(whole.inputs[:5], start=1)]
    assert _column(runs, "images/s")[:4] == ["4 (in 4.0 s)", "2 (in 8.0 s)", "8 (in 2.0 s)", "32 (in 0.5 s)"]
    assert _column(runs, "settings") == ["none", "dg_weight 2.0", "cfg_scale 3.0", "none", "none"]
    assert _column(runs, "method")[1:4] == ["discriminator guidance", "classifier-free guidance", "one-step generator"]
    assert "dgfast 0.1.0, torch 9.9 (runs 1, 2, 3, 4, 5)" in page.text
    metrics = page.tables["Metrics of each set of images"]
    assert _column(metrics, "images of") == ["training images", "plain", HOSTILE, "dg", "one step", "timeless"]
    assert _column(metrics, "frechet")[:2] == ["0.04688 (0.04219 to 0.05156)", "0.3125 (0.2812 to 0.3438)"]
    assert {*_column(metrics, "precision")} == {"0.8125"}
    assert page.tables["Differences on equal seeds"][1:] == [["dg", "plain", "-0.0625 (-0.09375 to -0.03125)"]]
    against_speed = page.tables["Quality and speed"]
    points = _column(against_speed, "point")
    assert points == ["1: 18 heun, eager", "3: 9 heun, eager", "2: 18 heun, compiled", "4: 1 step, eager"]
    assert _column(against_speed, "images/s") == ["4", "8", "2", "32"]
    assert "training images: these images were not drawn" in page.text
    assert "timeless: its manifest has no seconds" in page.text
    assert page.tables["Error of the call, in numbers"][1:] == [["80", "0", "8.1e-01"], ["0.5", "0", "1.5e-02"]]
    assert page.tables["Error of the state, in numbers"][-1] == ["0", "0", "1.0e-02"]
    assert "Machine: device a GPU." in page.text
    results = json.loads(whole.inputs[-1].read_text())
    measured = {row["name"]: row["extra_info"] for row in results["benchmarks"]}["bench_guided_step[mnist32-compiled]"]
    row = next(row for row in page.tables["Times of guided-step"] if row[0] == "guided_step mnist32-compiled")
    cells = dict(zip(page.tables["Times of guided-step"][0], row, strict=True))
    assert cells["x eager"] == f"{measured['speedup']:.2f}" and cells["error"] == f"{measured['error']:.1e}"
    assert f"torch {results['machine_info']['dgfast']['torch']}" in page.text
    assert re.search(r"with dgfast report .*quality\.json .*--out .*page", page.text)


def test_page_is_whole_by_itself_and_reads_no_name_as_markup(whole: Whole) -> None:
    page = _Reader(whole.text)
    assert not {name for name, _ in page.elements} & {"script", "link", "iframe", "object", "form", "base"}
    assert page.text.count(HOSTILE) == 3, "as two rows' name and as a benchmark's"
    assert page.text.count(HOSTILE.replace("/", "")) == 2, "as a folder's name"
    for name, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}, attributes
        for key in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:image/", "#")), (name, key, value)
    assert "default-src 'none'" in str([attributes for name, attributes in page.elements if name == "meta"])
    anchors = {attributes["href"] for name, attributes in page.elements if name == "a"}
    assert anchors == {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    assert not re.search(r"url\(|@import", whole.text)


def test_every_picture_has_a_text_and_is_a_file_as_well(whole: Whole) -> None:
    page = _Reader(whole.text)
    pictures = [attributes for name, attributes in page.elements if name == "img"]
    assert all(len(attributes["alt"] or "") > 20 for attributes in pictures)
    files = sorted(whole.folder.glob("*.png"))
    assert len(files) == len(pictures) == 5 + 2 + 2 + 1
    for file in files:
        with Image.open(file) as image:
            assert min(image.size) > 30
    shown = [(attributes["src"] or "").partition("base64,")[2] for attributes in pictures]
    assert base64.b64encode((whole.folder / "grid-1.png").read_bytes()).decode() in shown


def test_no_text_of_a_picture_is_clipped(whole: Whole) -> None:
    assert whole.clipped == [[]] * 5


def test_grids_hold_the_folders_own_images(made: Callable[..., str], tmp_path: Path) -> None:
    run_folder(tmp_path / "a", guidance=GuidanceConfig())
    made("a")
    with np.load(tmp_path / "a" / "images-00000.npz") as shard, Image.open("page/grid-1.png") as grid:
        pixels = np.asarray(grid).reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 8, 8)
        assert np.array_equal(pixels, shard["images"].squeeze(-1))


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"seeds": "100-115"}, "its first seeds are 100-115, not 0-15"),
        ({"side": 16}, "its images are 16 x 16 x 1, not 8 x 8 x 1"),
        ({"label": 4}, "its images are of other classes"),
        ({"seeds": "0-8"}, None),
    ],
)
def test_what_cannot_be_compared_gets_a_line(
    other: dict[str, str | int], line: str | None, made: Callable[..., str], tmp_path: Path
) -> None:
    run_folder(tmp_path / "a", guidance=GuidanceConfig())
    run_folder(tmp_path / "b", guidance=GuidanceConfig(), **other)  # type: ignore[arg-type]
    text = _Reader(made("a", "b")).text
    assert ("not to be compared image by image" in text) == (line is not None)
    assert line is None or f"b: not to be compared image by image with a: {line}." in text
    sizes = {Image.open(io.BytesIO(Path(f"page/grid-{k}.png").read_bytes())).size for k in (1, 2)}
    assert len(sizes) == (2 if "side" in other else 1), "side by side, both show as many images"


def test_no_speed_no_point_and_the_page_says_why(made: Callable[..., str], tmp_path: Path) -> None:
    run_folder(tmp_path / "timed", guidance=GuidanceConfig())
    run_folder(tmp_path / "timeless", guidance=GuidanceConfig(), seconds=None)
    rows = [
        judged("a", "timeless", 0.5),
        judged("b", "gone", 0.5),
        judged("c", "timed", 0.5, images=15),
        judged("d", "timed", 0.5, settings={"dtype": "bf16"}),
        judged("e", "timed", 0.5) | {"metrics": {}},
    ]
    page = _Reader(made("timed", "timeless", evaluation(tmp_path / "quality.json", rows)))
    assert "Quality and speed" not in page.tables and not list(Path("page").glob("quality-and-speed*"))
    for line in (
        "a: its manifest has no seconds of a run", "b: the folder gone was not given to this page",
        "c: the folder timed holds another run than the one that was judged (other number of images)",
        "d: the folder timed holds another run than the one that was judged (other dtype)", "e: it has no frechet",
    ):  # fmt: skip
        assert line in page.text


def test_rows_of_some_seeds_of_a_folder_have_its_speed(made: Callable[..., str], tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", guidance=GuidanceConfig())
    job = json.loads((run / "manifest.json").read_text())["job"]
    rows = [judged(f"a {seeds}", "a", 0.5, images=8, seeds=seeds, settings=job) for seeds in ("0-7", "8-15")]
    path = evaluation(tmp_path / "quality.json", rows)
    groups = [{"name": "a", "lowest": {"frechet": 0.25}, "mean": {"frechet": 0.375, "precision": 0.75}}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed_ranges": groups}))
    page = _Reader(made("a", path))
    assert _column(page.tables["Quality and speed"], "images/s") == ["4", "4"]
    assert page.tables["Over ranges of seeds"][1:] == [["a lowest", "0.25", ""], ["a mean", "0.375", "0.75"]]


def test_a_reference_of_moments_has_no_number_of_images(made: Callable[..., str], tmp_path: Path) -> None:
    path = evaluation(tmp_path / "quality.json", [judged("a", "a", 0.5)])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reference": {"name": "ref.npz", "images": None}}))
    assert "Against ref.npz, in the features of" in _Reader(made(path)).text


def test_rows_of_other_numbers_of_images_are_not_to_be_compared(made: Callable[..., str], tmp_path: Path) -> None:
    rows = [judged("a", "a", 0.5, images=2000), judged("b", "b", 0.5)]
    line = "Rows of 16 to 2,000 images: compare frechet between equal numbers only."
    assert line in _Reader(made(evaluation(tmp_path / "quality.json", rows))).text
    assert "equal numbers only" not in _Reader(made(evaluation(tmp_path / "quality.json", rows[:1]))).text


def test_names_that_are_no_utf8_are_on_the_page_and_its_pictures(made: Callable[..., str], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    run_folder(tmp_path / name, guidance=GuidanceConfig())
    page = _Reader(made(name, evaluation(tmp_path / "quality.json", [judged(name, name, 0.5)])))
    assert page.tables["Quality and speed"][1][0] == "caf\\udce9"
    assert _column(page.tables["Runs with their settings"], "folder") == ["1. caf\\udce9"]


def test_a_run_that_no_clock_told_has_no_speed(made: Callable[..., str], tmp_path: Path) -> None:
    run_folder(tmp_path / "a", guidance=GuidanceConfig(), seconds=1e-320)
    assert "its manifest has no seconds of a run" in _Reader(made("a")).text


def test_machines_are_not_held_against_each_other(made: Callable[..., str], tmp_path: Path) -> None:
    run_folder(tmp_path / "a", guidance=GuidanceConfig())
    run_folder(tmp_path / "b", guidance=GuidanceConfig(), device="a GPU", seconds=0.1)
    rows = [judged("a", "a", 0.5), judged("b", "b", 0.5)]
    text = made("a", "b", evaluation(tmp_path / "quality.json", rows))
    assert "different machines; each has a front of its own" in text


def test_what_nobody_gave_is_named(made: Callable[..., str], tmp_path: Path) -> None:
    run_folder(tmp_path / "a", guidance=GuidanceConfig())
    text = _Reader(made("a")).text
    missing = text[text.index("Not on this page") :]
    for word in ("trajectories:", "quality,", "error by noise level", "timing:"):
        assert word in missing
    assert "images on equal seeds:" not in missing


def test_a_new_page_takes_the_place_of_the_old_one(made: Callable[..., str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / name, guidance=GuidanceConfig())
    made("a", "b")
    assert Path("page/grid-2.png").exists()
    made("a")
    assert sorted(path.name for path in Path("page").iterdir()) == ["grid-1.png", "index.html"]


def test_markup_escapes_all_but_itself() -> None:
    assert tag("p", "<b>", tag("i", "&"), class_='"') == '<p class="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert joined(["a", Html("<br>")], "<hr>") == "a<hr><br>"
    assert "&lt;td&gt;" in table("<caption>", ["<td>"], [["<td>"]]) and "<caption>&lt;" in table("<", [], [])
