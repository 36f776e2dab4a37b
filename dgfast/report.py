"""Make one page of what was drawn and measured.

Takes folders of `dgfast sample`, files of `dgfast evaluate --json` and of `pytest --benchmark-json`, the results.json
of `python -m benchmarks.gpu`, and trajectory.npz of an earlier page. The page is one file of HTML that needs no
network, with its pictures as PNG beside it: images on equal seeds, trajectories, quality against speed, errors and
times. What nobody measured is not on it, and it says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dgfast.errors import UserError
from dgfast.job_options import GuidedCommand
from dgfast.option_types import IntegerRanges
from dgfast.options import Group, command_line, option
from dgfast.settings import settings_of
from dgfast.stopping import interruptible

if TYPE_CHECKING:  # torch takes longer to import than --help may take
    from dgfast.reporting.trajectory import Trajectory


@click.command(cls=GuidedCommand, help=__doc__)
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path))
@option(
    "--trajectory",
    "bundle",
    group=Group.INPUT,
    metavar="BUNDLE",
    help="Draw a few seeds of this bundle with and without guidance, and show both runs; the options below, else the "
    "bundle, say how.",
)
@option(
    "--seeds",
    group=Group.INPUT,
    type=IntegerRanges(2**32, "seeds go up to 4294967295"),
    help="Of --trajectory.  [default: 0-3]",
)
@option("--labels", group=Group.INPUT, type=IntegerRanges(), help="Its classes, repeated over the seeds.")
@option("--steps", "num_steps", group=Group.SOLVER, type=int, metavar="N", help="Its steps.")
@option(
    "--out",
    group=Group.OUTPUT,
    type=click.Path(path_type=Path),
    default="report",
    help="A new folder, or that of an earlier page, whose place this one takes.",
)
def main(inputs: tuple[Path, ...], bundle: str | None, out: Path, **options: Any) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    with interruptible("stopped before the page was whole; the same command makes it anew"):
        _main(inputs, bundle, out, given)


def _main(inputs: tuple[Path, ...], bundle: str | None, out: Path, given: dict[str, Any]) -> None:
    _require_something(inputs, bundle, given)
    from dgfast.extras import require

    require("matplotlib")
    from dgfast.reporting import inputs as readers
    from dgfast.reporting import page

    page.require_own(out)
    content = readers.read(inputs)
    drawn = None if bundle is None else _drawn(bundle, given)
    files = page.write(content, drawn, out, ["dgfast", "report", *command_line()])
    click.echo(f"{files[0]}: one page with {len(files) - 1} pictures, each as PNG beside it")


def _require_something(inputs: tuple[Path, ...], bundle: str | None, given: dict[str, Any]) -> None:
    """
    Raises:
        UserError: nothing to make a page of, or options of a trajectory that nobody asked for.
    """
    if bundle is None and given:
        context = click.get_current_context()
        names = [one.opts[0] for one in context.command.get_params(context) if one.name in given]
        raise UserError(f"{', '.join(names)} goes with --trajectory BUNDLE; give that too, or leave it out")
    if bundle is None and not inputs:
        raise UserError("nothing to report: give folders, files or --trajectory; see dgfast report --help")


def _drawn(bundle: str, given: dict[str, Any]) -> "Trajectory":
    from dgfast import bundle as bundles
    from dgfast.ranges import Ranges
    from dgfast.reporting.trajectory import record

    read = bundles.read(bundle)
    settings = settings_of(read, given)
    assert settings is not None, "no option here asks for a generator"
    return record(read, *settings, given.get("seeds", Ranges([(0, 3)])), given.get("labels"))


if __name__ == "__main__":
    main()
