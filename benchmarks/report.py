"""python -m benchmarks.report RESULTS.json...: the table, and with --out a plot, of what pytest-benchmark wrote."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dgfast.errors import UserError
from dgfast.extras import require

Row = dict[str, Any]

_TABLE, _PLOT = "benchmarks.md", "benchmarks.png"
_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def _duration(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median": ("median", _duration),
    "images_per_second": ("images/s", _number),
    "gflop_per_second": ("GFLOP/s", _number),
    "share_of_ceiling": ("of ceiling", "{:.0%}".format),
    "gb_per_second": ("GB/s", _number),
    "speedup": ("x eager", "{:.2f}".format),
    "over_default": ("x eager, torch's flags", "{:.2f}".format),
    "guided_over_unguided": ("guided / unguided", "{:.2f}".format),
    "error": ("error", "{:.1e}".format),
    "compile_seconds": ("compile, s", "{:.1f}".format),
}
"""Field of a row -> heading and format; a column stands where any row of a group has the field."""


@click.command(help=__doc__)
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=f"Folder for {_TABLE} and {_PLOT}.")
def main(results: tuple[Path, ...], out: Path | None) -> None:
    files = [read(path) for path in results]
    if not any(file["benchmarks"] for file in files):
        raise UserError(f"no benchmark was timed in {', '.join(map(str, results))}")
    rows = _against_default([row for file in files for row in _rows(file)])
    text = "\n".join([*dict.fromkeys(_origin(file) for file in files), "", *_tables(rows)])
    click.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / _TABLE).write_text(text + "\n")
        plot(rows, out / _PLOT)


def read(path: Path) -> dict[str, Any]:
    """What pytest-benchmark wrote.

    Raises:
        UserError: the file is something else.
    """
    try:
        found = json.loads(path.read_text())
        for benchmark in found["benchmarks"]:
            float(benchmark["stats"]["median"]), benchmark["group"], dict(benchmark["extra_info"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a result of pytest-benchmark ({error!r}); make one with: "
            "pytest benchmarks/ --benchmark-only --benchmark-json RESULTS.json"
        ) from error
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over eager of every row that has one, as bars.

    Raises:
        UserError: matplotlib is missing, or there is nothing to draw.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    drawn = [row for row in rows if "speedup" in row]
    if not drawn:
        raise UserError("no benchmark here has an eager one beside it; there is no speed-up to draw")
    figure = Figure(figsize=(8, 1 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(row["group"] for row in drawn))
    for i, group in enumerate(groups):
        places = [k for k, row in enumerate(drawn) if row["group"] == group]
        bars = axes.barh(places, [drawn[k]["speedup"] for k in places], color=f"C{i}", label=group)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_yticks(range(len(drawn)), [row["name"] for row in drawn])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager, in the same run")
    axes.margins(x=0.1)  # room for the labels
    figure.legend(loc="outside upper right", ncols=len(groups))
    figure.savefig(path)


def _rows(file: dict[str, Any]) -> Iterable[Row]:
    for benchmark in file["benchmarks"]:
        name = benchmark["name"].removeprefix("bench_").replace("[", " ").rstrip("]")
        median = {"median": benchmark["stats"]["median"]}
        yield benchmark["extra_info"] | median | {"group": benchmark["group"], "name": name}


def _against_default(rows: list[Row]) -> list[Row]:
    """With the speed-up over eager float32 as torch runs it unless told otherwise, where that was measured too."""

    def what(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in ("group", "workload", "batch", "guided"))

    plain = {what(row): row["median"] for row in rows if row.get("precision") == "default"}
    return [row | ({"over_default": plain[what(row)] / row["median"]} if what(row) in plain else {}) for row in rows]


def _origin(file: dict[str, Any]) -> str:
    machine = file.get("machine_info", {}).get("dgfast", {})
    said = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    return f"{file.get('datetime', 'at an unknown time')}: {said or 'an unknown machine'}"


def _tables(rows: list[Row]) -> Iterable[str]:
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        columns = {field: how for field, how in _COLUMNS.items() if any(field in row for row in members)}
        yield f"| {group} | {' | '.join(heading for heading, _ in columns.values())} |"
        yield "| --- |" + " ---: |" * len(columns)
        for row in members:
            cells = [write(row[field]) if field in row else "" for field, (_, write) in columns.items()]
            yield f"| {row['name']} | {' | '.join(cells)} |"
        yield ""


if __name__ == "__main__":
    main()
