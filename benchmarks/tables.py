"""Tables in markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import click

Row = Mapping[str, str | float]
"""Cells by the heading of their column."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one."""
    click.echo("\n".join(_lines(header, rows)) + "\n")


def tables(rows: Iterable[Row]) -> str:
    """One for each run of rows that have the same columns."""
    groups = ((header, [[_cell(value) for value in row.values()] for row in group]) for header, group in _runs(rows))
    return "\n\n".join("\n".join(_lines(header, cells)) for header, cells in groups)


def _runs(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, ...], Iterable[Row]]]:
    return groupby(rows, key=lambda row: tuple(row))


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"


def _cell(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
