"""One page of HTML that holds all it shows and asks nobody for anything, and its pictures as files beside it."""

import base64
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dgfast import __version__
from dgfast.errors import StorageError, UserError
from dgfast.files import replacing
from dgfast.reporting import runs, sections, trajectory
from dgfast.reporting.evaluation import Evaluation
from dgfast.reporting.markup import Html, tag
from dgfast.reporting.noise_errors import NoiseErrors
from dgfast.reporting.plotting import Picture
from dgfast.reporting.runs import Run
from dgfast.reporting.sections import Section
from dgfast.reporting.trajectory import Trajectory

PAGE, TRAJECTORY = "index.html", "trajectory.npz"
_TITLE = "dgfast report"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser itself lets nothing be fetched
_OURS = (PAGE, TRAJECTORY, "grid-*.png", "trajectories-*.png", "corrections-*.png", "quality-*.png", "errors-*.png",
         "timing-*.png", "*.partial")  # fmt: skip
_WANTED = {
    "runs": "runs and images on equal seeds: give folders of `dgfast sample`",
    "trajectories": "trajectories: give --trajectory BUNDLE, or the trajectory.npz of an earlier page",
    "quality": "quality, alone and against speed: give a file of `dgfast evaluate --json`",
    "errors": "error by noise level and number format: give the results.json of `python -m benchmarks.gpu`",
    "timing": "timing: give a file of `pytest benchmarks/ --benchmark-only --benchmark-json`",
}


@dataclass
class Content:
    """What a page is made of. timings: names of files, with what pytest-benchmark wrote into each."""

    runs: list[Run] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    errors: list[NoiseErrors] = field(default_factory=list)
    timings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def sections(self) -> Iterator[Section]:
        """Those that there is something to say in.

        Raises:
            UserError: a folder holds no images, but something else in their place.
        """
        if self.runs:
            yield sections.runs(self.runs)
            yield sections.grids([(run, runs.shown(run)) for run in self.runs])
        if self.trajectories:
            yield sections.trajectories(self.trajectories)
        if self.evaluations:
            yield sections.quality(self.evaluations, self.runs)
        if self.errors:
            yield sections.errors(self.errors)
        if self.timings:
            yield sections.times(self.timings)


def require_own(out: Path) -> None:
    """
    Raises:
        UserError: the folder holds what no page of dgfast has, which would be lost in it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new folder")
    ours = {path for pattern in _OURS for path in out.glob(pattern)}
    foreign = next((path.name for path in sorted(out.glob("*")) if path not in ours), None)
    if foreign is not None:
        raise UserError(f"--out {out} already holds {foreign}; name a new folder, nothing was changed")


def write(content: Content, drawn: Trajectory | None, out: Path, command: Sequence[str]) -> list[Path]:
    """Write the page and its pictures, in the place of those of an earlier page.

    Args:
        drawn: a trajectory more, which is kept as `TRAJECTORY` beside the page.
        command: that made it, word by word.

    Returns:
        The page and its pictures.

    Raises:
        UserError: see `Content.sections`. StorageError: the folder cannot be written.
    """
    if drawn is not None:
        content = replace(content, trajectories=[*content.trajectories, drawn])
    made = list(content.sections())
    pictures = {picture.name: picture for section in made for picture in _pictures(section)}
    files = {PAGE: _page(made, command).encode()} | {f"{name}.png": one.png for name, one in pictures.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if drawn is not None:
            trajectory.save(drawn, out / TRAJECTORY)
        for name, data in files.items():
            with replacing(out / name) as file:
                file.write(data)
        for path in out.glob("*.png"):
            if path.name not in files:
                path.unlink()
    except OSError as error:
        raise StorageError(f"--out {out}: can't be written ({error.strerror or error})") from error
    return [out / name for name in files]


def _pictures(section: Section) -> Iterator[Picture]:
    for part in section.parts:
        yield from [part] if isinstance(part, Picture) else part if isinstance(part, list) else []


def _page(made: Sequence[Section], command: Sequence[str]) -> str:
    style = (Path(__file__).parent / "page.css").read_text()
    there = {section.anchor for section in made}
    lacking = [text for anchor, text in _WANTED.items() if anchor not in there]
    links = (tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in made)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", _TITLE),
        Html(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag("header", tag("h1", _TITLE), tag("nav", tag("ul", *links), aria_label="Sections")),
        tag("main", *map(_section, made)),
        tag("footer", *_foot(lacking, command)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(section: Section) -> Html:
    parts = (part if isinstance(part, Html) else _shown(part) for part in section.parts)
    return tag("section", tag("h2", section.title, id=section.anchor), *parts, aria_labelledby=section.anchor)


def _shown(part: Picture | list[Picture]) -> Html:
    if isinstance(part, list):
        return tag("div", *map(_shown, part), class_="grids")
    kind, data = ("image/png", part.png) if part.svg is None else ("image/svg+xml", part.svg)
    size = {"width": str(part.width)} if part.width else {}
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("img", src=source, alt=part.alt, **size), tag("figcaption", part.title))


def _foot(lacking: Sequence[str], command: Sequence[str]) -> Iterator[Html]:
    if lacking:
        yield tag("p", "Not on this page, for nothing was given that tells of it:")
        yield tag("ul", *(tag("li", text) for text in lacking))
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield tag("p", f"Made by dgfast {__version__} on {when} with ", tag("code", shlex.join(command)))
