"""Measure how good the images of `dgfast sample` are.

Compares each folder's shards with held-out real images in the features of the bundle's own small classifier: Frechet
and kernel distance (torchmetrics), precision, recall, density and coverage (prdc), and the mean log-ratio of the
bundle's discriminator. The first row is the yardstick: training images in the place of generated ones. Distances in
these features are for comparison with each other only, not with published Inception figures.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgfast.errors import UserError
from dgfast.options import Command, Group, option

if TYPE_CHECKING:  # torch takes longer to import than --help may take
    from dgfast.training.data import ImageSet

_YARDSTICK = 2000  # training images in the first row


@click.command(cls=Command, help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--bundle", group=Group.INPUT, default="mnist32", show_default=True, help="Whose features and discriminator judge."
)
@option(
    "--data", group=Group.INPUT, default="mnist", show_default=True, help="`mnist`, or an npz with images and labels."
)
@option("--holdout", group=Group.INPUT, default=1000, show_default=True, help="Held-out images, as in training.")
@option("--json", "report", group=Group.OUTPUT, type=click.Path(path_type=Path), help="Write the numbers there too.")
@option("--device", group=Group.RUNTIME, help="cpu or cuda; default: what is there.")
def main(
    folders: tuple[Path, ...], bundle: str, data: str, holdout: int, report: Path | None, device: str | None
) -> None:
    from dgfast.extras import require

    require("torchmetrics", "prdc")
    if report is not None and not report.absolute().parent.is_dir():
        raise UserError(f"--json {report}: there is no folder {report.parent}; make it first")

    from tqdm import tqdm

    from dgfast import bundle as bundles
    from dgfast.devices import pick_device, precision
    from dgfast.judge import Judge

    yardstick, held_out = _real(data, holdout)
    sets = {"training images": yardstick} | {str(folder): _drawn(folder) for folder in folders}
    judge = Judge(bundles.read(bundle), held_out, pick_device(device))
    for name, images in {f"--data {data}": held_out, **sets}.items():
        judge.require_fit(name, images)
    _note_what_may_be_unfinished(folders)
    work = sum(judge.work(images) for images in sets.values())
    bar = tqdm(total=work, unit="image", desc="judging", dynamic_ncols=True, disable=None)  # not into a log file
    with bar, precision("float32"):
        rows = {name: judge(images, bar.update) for name, images in sets.items()}
    _print_table(rows)
    if report is not None:
        _write(report, rows)


# Images ---------------------------------------------------------------------------------------------------------------
def _real(data: str, holdout: int) -> "tuple[ImageSet, ImageSet]":
    """Training images for the first row, and held-out ones.

    Raises:
        UserError: no such images, or too few of either.
    """
    from dgfast.judge import FEWEST
    from dgfast.training.data import ImageSet, load_images, split

    if holdout < FEWEST:
        raise UserError(
            f"--holdout {holdout}: images are compared with these; give {FEWEST} at least, better a thousand"
        )
    real = load_images(data)
    train, held_out = split(real, holdout)
    if len(train) < FEWEST:
        raise UserError(
            f"--holdout {holdout} leaves {len(train)} of {len(real)} images for the first row; leave {FEWEST} at least"
        )
    return ImageSet(train.images[:_YARDSTICK], train.labels[:_YARDSTICK]), held_out


def _drawn(folder: Path) -> "ImageSet":
    """All images of a job.

    Raises:
        UserError: none there, not all, or something else.
    """
    from dgfast.image_folder import read_images
    from dgfast.training.data import image_set

    return image_set(*read_images(folder), folder)


def _note_what_may_be_unfinished(folders: tuple[Path, ...]) -> None:
    from dgfast.manifest import promised_images

    for folder in folders:
        if promised_images(folder) is None:
            click.echo(
                f"{folder} has no manifest that says how many images belong to it; judging those there", err=True
            )


# The table ------------------------------------------------------------------------------------------------------------
def _print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    click.echo(" " * width + "".join(f"{column:>12}" for column in columns))
    for name, row in rows.items():
        cells = (f"{row[c]:>12d}" if isinstance(row[c], int) else f"{row[c]:>12.4f}" for c in columns)
        click.echo(f"{name:<{width}}" + "".join(cells))


def _write(report: Path, rows: dict[str, dict[str, float]]) -> None:
    """
    Raises:
        UserError: the file cannot be written.
    """
    try:
        report.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--json {report}: cannot be written ({error.strerror}); the table above is complete"
        ) from error


if __name__ == "__main__":
    main()
