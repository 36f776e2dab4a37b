"""python -m benchmarks.report RESULTS.json...: the table, and with --out a plot, of what pytest-benchmark wrote."""

from collections.abc import Iterable
from pathlib import Path

import click

from dgfast.errors import UserError
from dgfast.extras import require
from dgfast.reporting.timings import Row, origin, read, rows, tables

_TABLE, _PLOT = "benchmarks.md", "benchmarks.png"


@click.command(help=__doc__)
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=f"Folder for {_TABLE} and {_PLOT}.")
def main(results: tuple[Path, ...], out: Path | None) -> None:
    files = [read(path) for path in results]
    if not any(file["benchmarks"] for file in files):
        raise UserError(f"no benchmark was timed in {', '.join(map(str, results))}")
    measured = rows(files)
    text = "\n".join([*dict.fromkeys(origin(file) for file in files), "", *_lines(measured)])
    click.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / _TABLE).write_text(text + "\n")
        plot(measured, out / _PLOT)


def plot(measured: list[Row], path: Path) -> None:
    """Speed-up over eager of every row that has one, as bars.

    Raises:
        UserError: matplotlib is missing, or there is nothing to draw.
    """
    require("matplotlib")
    from dgfast.reporting.figures import speed_ups

    if not any("speedup" in row for row in measured):
        raise UserError("no benchmark here has an eager one beside it; there is no speed-up to draw")
    path.write_bytes(speed_ups(path.stem, measured, "speed-up over eager").png)


def _lines(measured: list[Row]) -> Iterable[str]:
    for headings, body in tables(measured):
        yield f"| {' | '.join(headings)} |"
        yield "| --- |" + " ---: |" * (len(headings) - 1)
        yield from (f"| {' | '.join(cells)} |" for cells in body)
        yield ""


if __name__ == "__main__":
    main()
