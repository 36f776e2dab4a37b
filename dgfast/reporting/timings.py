"""What pytest-benchmark wrote: times, and ratios of times of one run."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dgfast.bounds import read_json
from dgfast.errors import UserError

Row = dict[str, Any]

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def _duration(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= size), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def number(value: float) -> str:
    """Three digits, and no exponent of large ones."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median": ("median", _duration),
    "images_per_second": ("images/s", number),
    "gflop_per_second": ("GFLOP/s", number),
    "share_of_ceiling": ("of ceiling", "{:.0%}".format),
    "gb_per_second": ("GB/s", number),
    "speedup": ("x eager", "{:.2f}".format),
    "over_default": ("x eager, torch's flags", "{:.2f}".format),
    "guided_over_unguided": ("guided / unguided", "{:.2f}".format),
    "error": ("error", "{:.1e}".format),
    "compile_seconds": ("compile, s", "{:.1f}".format),
}
"""Field of a row -> heading and format; a column stands where any row of a group has the field."""


def read(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        UserError: the file is something else.
    """
    try:
        return parse(path, read_json(path))
    except ValueError as error:
        raise error if isinstance(error, UserError) else _foreign(path, error) from error


def parse(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content again.

    Raises:
        UserError: it is something else.
    """
    try:
        for benchmark in content["benchmarks"]:
            float(benchmark["stats"]["median"]), str(benchmark["name"]), benchmark["group"]
            for field, (_, write) in COLUMNS.items():
                if field in benchmark["extra_info"]:
                    write(benchmark["extra_info"][field])
    except (ValueError, KeyError, TypeError) as error:
        raise _foreign(path, error) from error
    return content


def _foreign(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a result of pytest-benchmark ({error!r}); make one with: "
        "pytest benchmarks/ --benchmark-only --benchmark-json RESULTS.json"
    )


def rows(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """All benchmarks of some files, one a row; what is compared was measured in one run."""
    return [row for file in files for row in _against_default([*_rows(file)])]


def origin(file: Mapping[str, Any]) -> str:
    """When, on which machine and with which versions a file was made."""
    machine = file.get("machine_info", {}).get("dgfast", {})
    said = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    return f"{file.get('datetime', 'at an unknown time')}: {said or 'an unknown machine'}"


def tables(rows: list[Row]) -> Iterable[tuple[list[str], list[list[str]]]]:
    """Headings and cells of a table a group; the group's name heads its first column."""
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        columns = {field: how for field, how in COLUMNS.items() if any(field in row for row in members)}
        cells = [
            [row["name"], *(write(row[field]) if field in row else "" for field, (_, write) in columns.items())]
            for row in members
        ]
        yield [str(group), *(heading for heading, _ in columns.values())], cells


def _rows(file: Mapping[str, Any]) -> Iterable[Row]:
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
