"""Measure how good the images of `dgfast sample` are, or any others.

Compares each folder, or npz file, of generated images with real ones, in the features of the bundle's own small
classifier, or of a TorchScript file (--features) such as Inception or DINOv2: Frechet distance (FID, FD-DINOv2), kernel
distance (torchmetrics), precision, recall, density and coverage (prdc), and the mean log-ratio of the bundle's
discriminator. Where --data has the real ones, the first row is the yardstick: training images in the place of generated
ones. Distances in a small classifier's features are for comparison with each other only.

--features runs the file that it names. TorchScript is a program of torch's operators (no Python), some of which read
and write files: name only one that you would run.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dgfast.errors import StorageError, UserError
from dgfast.options import Command, Group, option
from dgfast.ranges import Ranges
from dgfast.stopping import interruptible

if TYPE_CHECKING:  # torch takes longer to import than --help may take
    from dgfast.evaluation.judge import Judge, Row

_BY_FOLDER = "folders"


class SeedRanges(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """Ranges of seeds, each judged by itself, such as 0-49999,50000-99999; or the word "folders"."""

    name = "ranges"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Sequence[tuple[int, int]] | str:
        if value == _BY_FOLDER:
            return _BY_FOLDER
        ranges = []
        for part in str(value).split(","):
            first, _, last = part.partition("-")
            if not (
                first.isdecimal() and last.isdecimal() and max(len(first), len(last)) < 19 and int(first) <= int(last)
            ):
                self.fail(f"{part[:40]!r}: expected ranges such as 0-49999,50000-99999, or {_BY_FOLDER}", param, ctx)
            ranges.append((int(first), int(last)))
        if (twice := Ranges(ranges).repeated) is not None:
            self.fail(f"seed {twice} stands in two ranges; give ranges without common seeds", param, ctx)
        return ranges


@click.command(cls=Command, help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--bundle", group=Group.INPUT, default="mnist32", help="Whose features and discriminator judge.")
@option(
    "--features", group=Group.INPUT, type=click.Path(path_type=Path), metavar="FILE",
    help="A TorchScript file whose features judge in the place of the bundle's; it is run.",
)  # fmt: skip
@option(
    "--features-range", group=Group.INPUT, type=click.Choice(["0,255", "0,1", "-1,1", "imagenet"]),
    help="Values of pixels that it reads; imagenet: normalised by ImageNet's mean and deviation, as for DINOv2. "
    "[default: 0,255 of an Inception, which takes return_features; else it must be given]",
)  # fmt: skip
@option(
    "--features-size", group=Group.INPUT, type=click.IntRange(1, 4096), metavar="SIDE",
    help="Resize images to so many pixels a side first, bicubic and antialiased (DINOv2: 224).  [default: as they are]",
)  # fmt: skip
@option("--data", group=Group.INPUT, help="`mnist`, or an npz with images and labels.  [default: mnist]")
@option("--holdout", type=int, group=Group.INPUT, help="Images of --data that are the reference.  [default: 1000]")
@option(
    "--reference", group=Group.INPUT, type=click.Path(path_type=Path), metavar="PATH",
    help="Compare with that in the place of --data: a folder or npz of images, or moments (EDM's .npz, EDM2's .pkl).",
)  # fmt: skip
@option(
    "--seed-ranges", group=Group.INPUT, type=SeedRanges(),
    help="Judge each range of seeds by itself, such as 0-49999,50000-99999, and print lowest and mean; `folders`: of "
    "the folders.",
)  # fmt: skip
@option(
    "--metrics", group=Group.OUTPUT, help="Some of the columns, separated by commas.  [default: all that can be had]"
)
@option(
    "--bootstrap", group=Group.OUTPUT, type=click.IntRange(0), metavar="N",
    help="95 % intervals of so many resamples; 0: none.  [default: 200 if a feature has 256 numbers or fewer]",
)  # fmt: skip
@option(
    "--subset", group=Group.OUTPUT, type=click.IntRange(7), default=10_000, metavar="N",
    help="Images of each side that kernel, precision, recall, density and coverage look at, at most.",
)  # fmt: skip
@option("--json", "report", group=Group.OUTPUT, type=click.Path(path_type=Path), help="Write the numbers there too.")
@option("--device", group=Group.RUNTIME, help="cpu or cuda; default: what is there.")
def main(**options: Any) -> None:
    with interruptible("stopped before anything was written"):
        _main(options.pop("report"), options)


def _main(report: Path | None, options: dict[str, Any]) -> None:
    from dgfast.extras import require

    require("torchmetrics", "prdc")
    if report is not None:
        _require_own(report)

    from tqdm import tqdm

    from dgfast.devices import precision
    from dgfast.evaluation.request import Request, prepare

    ranges = options.pop("seed_ranges") or ()
    of_seeds = () if ranges == _BY_FOLDER else ranges
    with precision("float32"):
        prepared = prepare(Request(**options, ranges=of_seeds))
        for note in prepared.notes:
            click.echo(note, err=True)
        quiet = None if prepared.resamples else True
        # Not into a log file.
        with (
            tqdm(total=prepared.work, unit="image", desc="judging", dynamic_ncols=True, disable=None) as bar,
            tqdm(
                total=prepared.resamples, unit="resample", desc="intervals", dynamic_ncols=True, position=1,
                disable=quiet,
            ) as resampling,
        ):  # fmt: skip
            judge = prepared.judge(bar.update, resampling.update)
            rows = [row for images in prepared.yardstick for row in judge(images, (), bar.update)]
            of_folders = {images.name: judge(images, of_seeds, bar.update) for images in prepared.sets}
    all_folders = [row for each in of_folders.values() for row in each]
    groups = {"": all_folders} if ranges == _BY_FOLDER else of_folders if ranges else {}
    _print(judge, [*rows, *all_folders], groups)
    if report is not None:
        _write(report, judge, [*rows, *all_folders], groups)


# Results --------------------------------------------------------------------------------------------------------------
def _print(judge: "Judge", rows: "Sequence[Row]", groups: "Mapping[str, Sequence[Row]]") -> None:
    from dgfast.evaluation.results import interval_lines, other_classes, table

    for note in other_classes(rows):
        click.echo(note, err=True)
    lines = table(rows, groups)
    if any(row.resampled for row in rows):
        lines += ["", *interval_lines(rows, judge.bootstrap)]
    click.echo("\n".join(lines))


def _require_own(report: Path) -> None:
    """
    Raises:
        UserError: no file can be there, or what is there is no earlier one of this command.
    """
    from dgfast.bounds import read_json
    from dgfast.evaluation.results import FORMAT

    folder = report.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--json {report}: there is no folder {report.parent}; make it first")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--json {report}: the folder {report.parent} is not to be written to; name another one")
    if not report.exists():
        return
    try:
        content = read_json(report)
    except ValueError:  # no file, or none of JSON
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"--json {report} is there, and no file of this command; name another one, nothing was changed")


def _write(report: Path, judge: "Judge", rows: "Sequence[Row]", groups: "Mapping[str, Sequence[Row]]") -> None:
    """
    Raises:
        StorageError: the file cannot be written.
    """
    from dgfast.evaluation.results import as_json
    from dgfast.files import replacing

    content = as_json(judge.reference, judge.extractor.name, rows, groups, judge.most)
    try:
        with replacing(report) as file:
            file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise StorageError(
            f"--json {report}: cannot be written ({error.strerror}); the table above is complete"
        ) from error


if __name__ == "__main__":
    main()
