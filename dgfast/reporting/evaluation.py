"""What `dgfast evaluate --json` wrote: metrics of folders, with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgfast.errors import UserError, one_line
from dgfast.reporting.runs import Run

FORMAT = "dgfast-evaluation-1"
DISTANCE = "frechet"
"""The metric that is held against speed; less is better."""
_LARGEST = 1e100
"""What no metric comes near, and matplotlib has room around."""


@dataclass(frozen=True)
class Value:
    """A number, and the interval that it was found to lie in; None where none was made."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" ({self.low:.4g}\xa0to\xa0{self.high:.4g})"
        )  # not to be torn

        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class Judged:
    """One row.

    Attributes:
        folder: as the file names it; None for images that were not drawn. seeds: as text, or nothing.
        against: the row that `differences` are to.
    """

    name: str
    folder: str | None
    images: int
    seeds: str
    metrics: Mapping[str, Value]
    against: str
    differences: Mapping[str, Value]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One file. Its rows are comparable with one another, and not with those of other references or features.

    Attributes:
        over_seeds: what is said of rows that differ in their seeds alone, "lowest" or "mean", and the metrics' values.
    """

    path: Path
    reference: str
    features: str
    rows: Sequence[Judged]
    over_seeds: Sequence[tuple[str, Mapping[str, float]]] = ()

    @property
    def metrics(self) -> list[str]:
        """The metrics of any row, in the order of the file."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))


def parse(path: Path, content: Mapping[str, Any]) -> Evaluation:
    """
    Raises:
        UserError: what the file lacks.
    """
    try:
        reference = content["reference"]
        said = str(reference["name"])
        if reference["images"] is not None:  # of moments in a file nobody knows
            said += f" ({_count(reference['images']):,} images)"
        over_seeds = [
            (
                f"{group['name']} {kind}".strip(),
                {str(name): _value(name, {"value": v}).value for name, v in group[kind].items()},
            )
            for group in content.get("seed_ranges") or ()
            for kind in ("lowest", "mean")
        ]
        return Evaluation(path, said, str(content["features"]), [_row(row) for row in content["rows"]], over_seeds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no whole file of `dgfast evaluate --json` ({one_line(repr(error))}); make it anew"
        ) from error


def _row(row: Mapping[str, Any]) -> Judged:
    difference = dict(row.get("difference") or {})
    folder, against = row["folder"], str(difference.pop("against", ""))
    if not isinstance(row["name"], str) or not isinstance(folder, str | None) or "\0" in (folder or ""):
        raise TypeError("a row's name and folder are texts")
    metrics = {str(name): _value(name, value) for name, value in row["metrics"].items()}
    differences = {str(name): _value(name, value) for name, value in difference.items()}
    seeds, settings = str(row.get("seeds") or ""), dict(row.get("settings") or {})
    if not isinstance(settings.get("job", {}), dict):
        raise TypeError("a row's job is no object")
    return Judged(row["name"], folder, _count(row["images"]), seeds, metrics, against, differences, settings)


def _value(name: str, value: Mapping[str, Any]) -> Value:
    numbers = [value["value"], value.get("low"), value.get("high")]
    are_numbers = [type(number) in (int, float) and abs(number) < _LARGEST for number in numbers]
    if not are_numbers[0] or not all(
        is_one or number is None for is_one, number in zip(are_numbers, numbers, strict=True)
    ):
        raise ValueError(f"{name} is no number")
    if all(are_numbers) and numbers[1] > numbers[2]:
        raise ValueError(f"the interval of {name} ends before it begins")
    return Value(float(numbers[0]), *numbers[1:])


def _count(images: object) -> int:
    if type(images) is not int or not 0 <= images < _LARGEST:
        raise TypeError("a number of images is none")
    return images


def run_of(row: Judged, evaluation: Evaluation, runs: Sequence[Run]) -> tuple[Run | None, str]:
    """The run that drew a row's images, among those given; else None and why.

    The row's folder is looked for where the command runs, and beside the evaluation's file.
    """
    if row.folder is None:
        return None, "these images were not drawn"
    places = {(base / row.folder).resolve() for base in (Path(), evaluation.path.parent)}
    run = next((run for run in runs if run.folder.resolve() in places), None)
    if run is None:
        return None, f"the folder {row.folder} was not given to this page"
    judged = row.settings.get("job", row.settings)
    other = [name for name in judged if name in run.job and judged[name] != run.job[name]]
    if not judged and row.images != run.images:  # of a file that knows the settings, a row may be of some seeds alone
        other = ["number of images"]
    if other:
        return (
            None,
            f"the folder {row.folder} holds another run than the one that was judged (other {', '.join(other)})",
        )
    return run, run.no_speed
