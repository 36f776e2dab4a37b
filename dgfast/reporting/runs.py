"""Folders of `dgfast sample`: their settings, how fast they were drawn, and their first images."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgfast.bounds import read_json
from dgfast.chunks import Chunk
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError, one_line
from dgfast.guidance.declaration import GUIDANCES
from dgfast.guidance.options import Option
from dgfast.image_folder import read_files
from dgfast.manifest import NAME, strict
from dgfast.outputs import FORMATS
from dgfast.ranges import Ranges

SHOWN = 36
"""Images of a folder that the page shows, at most."""
_SHORTEST = 1e-6
"""Seconds that a clock tells; a run of fewer has no speed."""
UNGUIDED, ONE_STEP = "unguided", "one-step generator"


@dataclass(frozen=True)
class Speed:
    """What the manifest says of drawing, without the time that compiling took.

    Attributes:
        images, seconds: of all runs that were told together. machine: the device, and how many processes there were.
    """

    images: int
    seconds: float
    machine: str

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


@dataclass(frozen=True)
class Run:
    """One folder.

    Attributes:
        name: the folder, as it was given. job: what its manifest says of what decides on the images.
        images: of the whole job. complete: whether all are there. facts: what the manifest tells of the last run that
            drew something. speed: None where the manifest does not say it; no_speed: why.
    """

    folder: Path
    name: str
    job: Mapping[str, Any]
    images: int
    complete: bool
    facts: Mapping[str, Any]
    speed: Speed | None
    no_speed: str

    @property
    def method(self) -> str:
        """The guidances that its settings turn on, in words."""
        if self.job.get("one_step"):
            return ONE_STEP
        settings = self.job.get("guidance") or {}
        acting = [
            guidance.name for guidance in GUIDANCES if any(_turned_on(settings, one) for one in guidance.options())
        ]
        return " + ".join(acting) or UNGUIDED

    @property
    def steps(self) -> str:
        """How many steps of which solver."""
        if self.job.get("one_step"):
            return "1 step"
        sampling = self.job.get("sampling") or {}
        steps = (
            f"respaced {sampling['respacing']}" if sampling.get("respacing") else f"{sampling.get('num_steps')} steps"
        )
        return f"{steps}, {sampling.get('solver')}"

    @property
    def settings(self) -> dict[str, Any]:
        """Sampling and guidance, as far as they are not what every job has unless told otherwise, without `steps`."""
        every = changed(self.job.get("sampling") or {}, self.job.get("guidance") or {})
        return {name: value for name, value in every.items() if name not in ("num_steps", "respacing", "solver")}


def changed(sampling: Mapping[str, Any], guidance: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings as JSON has them, those that are not dgfast's defaults."""
    usual = json.loads(json.dumps(strict(asdict(SamplingConfig()) | asdict(GuidanceConfig()))))
    chosen = {**sampling, **guidance}
    return {name: value for name, value in chosen.items() if name not in usual or value != usual[name]}


def _turned_on(settings: Mapping[str, Any], option: Option) -> bool:
    """Whether the option is a weight, or a file, without which its guidance would not act."""
    acts = option.attribute is not None or option.file
    return acts and settings.get(option.name) not in (option.default, option.off, None)


def read(folder: Path) -> Run:
    """What a folder's manifest says.

    Raises:
        UserError: it has none, or one that is not dgfast's.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {NAME}: give a folder that `dgfast sample --out {folder}` wrote")
    try:
        content = read_json(path)
        job, runs, images = dict(content["job"]), [dict(run) for run in content["runs"]], int(content["images"])
        Ranges.parse(job["seeds"])
        for section in ("sampling", "guidance"):
            dict(job.get(section) or {})
        timed = [run for run in runs if float(run.get("seconds", 0)) > _SHORTEST and int(run.get("images", 0)) > 0]
        last = (timed or runs or [{}])[-1]
        speed, no_speed = _speed(timed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest of `dgfast sample` ({one_line(repr(error))})") from error
    return Run(folder, str(folder), job, images, content.get("complete") is True, last, speed, no_speed)


def _speed(timed: Sequence[Mapping[str, Any]]) -> tuple[Speed | None, str]:
    """Of runs with images and seconds; else None and why."""
    machines = {f"{run.get('device')}, {run.get('processes', 1)} process(es), {run.get('runtime')}" for run in timed}
    if not timed:
        return None, "its manifest has no seconds of a run that came to its end"
    if len(machines) > 1:
        return None, "it was drawn in several ways, on other devices or in other runtimes"
    processes = int(timed[0].get("processes", 1))
    machine = f"{timed[0].get('device')}" + (f", {processes} processes" if processes > 1 else "")
    return Speed(sum(int(run["images"]) for run in timed), sum(float(run["seconds"]) for run in timed), machine), ""


# Images ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shown:
    """The first images of a run: uint8 [N, H, W, C], with their seeds and class labels, -1 for none."""

    run: Run
    images: np.ndarray
    seeds: Sequence[int]
    labels: Sequence[int]

    def first(self, count: int) -> "Shown":
        return Shown(self.run, self.images[:count], self.seeds[:count], self.labels[:count])

    def unlike(self, other: "Shown") -> str:
        """Why the two cannot stand side by side; nothing where they can."""
        count = min(len(self.seeds), len(other.seeds))
        one, two = self.first(count), other.first(count)
        if one.images.shape != two.images.shape:
            return f"its images are {_size(one)}, not {_size(two)}"
        if [*one.seeds] != [*two.seeds]:
            return f"its first seeds are {Ranges.of(one.seeds)}, not {Ranges.of(two.seeds)}"
        return "" if [*one.labels] == [*two.labels] else "its images are of other classes"


def shown(run: Run) -> Shown | None:
    """The first images of a run; None where it keeps none that can be looked at.

    Raises:
        UserError: its files hold something else.
    """
    parts = list(_parts(run))
    if not parts:
        return None
    try:
        images, seeds, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    except ValueError as error:
        raise UserError(f"{run.folder}: images of different sizes or channels ({one_line(error)})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"{run.folder}: images must be uint8 [N, H, W, C]; found {images.dtype} {list(images.shape)}; the command "
            "that drew them draws them again"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{run.folder}: labels must be one whole number an image; found {list(labels.shape)}")
    return Shown(run, images[:SHOWN], seeds[:SHOWN].tolist(), labels[:SHOWN].tolist())


def _parts(run: Run) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, seeds and labels, file by file, until there are enough."""
    seeds, count = Ranges.parse(run.job["seeds"])[:SHOWN], 0
    for path in sorted(run.folder.glob("images-*.npz"), key=lambda path: (len(path.name), path.name)):
        if count >= SHOWN:
            return
        images, labels = read_files(run.folder, [path.name])
        yield images, _seeds(path, len(images)), labels
        count += len(images)
    if count:
        return
    names = [name for name in FORMATS["png"].paths(Chunk(0, seeds)) if (run.folder / name).is_file()]
    if names:
        images, labels = read_files(run.folder, names)
        yield images, np.array([int(Path(name).stem) for name in names]), labels
        return
    for path in run.folder.glob("samples_*.npz"):
        images, labels = (array[: len(seeds)] for array in read_files(run.folder, [path.name]))
        grey = (images == images[..., :1]).all()  # which it keeps as three channels
        yield images[..., :1] if grey else images, np.array([*seeds]), labels


def _seeds(path: Path, count: int) -> np.ndarray:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
            seeds: np.ndarray = shard["seeds"]
        if seeds.shape != (count,) or seeds.dtype.kind not in "iu":
            raise ValueError("seeds are not one whole number an image")
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no images with their seeds ({one_line(error)})") from error
    return seeds


def side_by_side(all_shown: Sequence[Shown]) -> list[list[Shown]]:
    """Groups whose images can be compared one by one, in the order of their first folders."""
    groups: list[list[Shown]] = []
    for one in all_shown:
        group = next((group for group in groups if not one.unlike(group[0])), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [[one.first(min(len(other.seeds) for other in group)) for one in group] for group in groups]


def _size(shown: Shown) -> str:
    return " x ".join(map(str, shown.images.shape[1:]))
