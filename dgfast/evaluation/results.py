"""The table of `dgfast evaluate`, and its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgfast.evaluation.intervals import Estimate
from dgfast.evaluation.judge import Row
from dgfast.evaluation.reference import Reference

FORMAT = "dgfast-evaluation-1"
_DISTANCES = ("frechet", "kernel")
"""Of which the lowest over ranges of seeds is the best, and what papers report."""


def bases(rows: Sequence[Row]) -> list[Row | None]:
    """For each row the first one above it on equal seeds, if both were resampled."""
    first: dict[str, Row] = {}
    found = [None if row.seeds is None else first.setdefault(row.seeds, row) for row in rows]
    return [None if base is row or not row.resampled else base for base, row in zip(found, rows, strict=True)]


def other_classes(rows: Sequence[Row]) -> list[str]:
    """Lines: which rows have other classes than those that they are held against."""
    return [
        f"{row.name}: on the seeds of {base.name}, but of other classes; the difference is one of these, too"
        for row, base in zip(rows, bases(rows), strict=True)
        if base is not None and not np.array_equal(row.labels, base.labels)
    ]


def over_ranges(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The "lowest" of each distance, and the "mean" of each metric, over rows of one network's images."""
    metrics = [name for name in rows[0].metrics if all(name in row.metrics for row in rows)]
    values = {name: [row.metrics[name].value for row in rows] for name in metrics}
    return {
        "lowest": {name: min(values[name]) for name in metrics if name in _DISTANCES},
        "mean": {name: sum(values[name]) / len(rows) for name in metrics},
    }


# The table ------------------------------------------------------------------------------------------------------------
def table(rows: Sequence[Row], groups: Mapping[str, Sequence[Row]]) -> list[str]:
    """Lines: a row a set of images, then the lowest and the mean of each group of rows."""
    columns = list(rows[0].metrics)
    lines = [(row.name, [f"{row.images:>12d}", *(f"{row.metrics[c].value:>12.4f}" for c in columns)]) for row in rows]
    for name, group in groups.items():
        for kind, values in over_ranges(group).items():
            cells = (f"{values[c]:>12.4f}" if c in values else " " * 12 for c in columns)
            lines.append((f"{name} {kind}".strip(), [" " * 12, *cells]))
    width = max(len(name) for name, _ in lines)
    header = " " * width + "".join(f"{column:>12}" for column in ("images", *columns))
    return [header, *(f"{name:<{width}}{''.join(cells)}".rstrip() for name, cells in lines)]


def interval_lines(rows: Sequence[Row], bootstrap: int) -> list[str]:
    """Lines: the intervals of each row, and of its difference to the first row on equal seeds."""
    lines = [f"95 % intervals of {bootstrap} resamples of the generated images"]
    for row, base in zip(rows, bases(rows), strict=True):
        more = {} if base is None else row.less(base)
        for name in (name for name in row.metrics if name in row.resampled):
            line = f"{row.name}  {name} {_with_interval(row.metrics[name], '.4f')}"
            if base is not None and name in more:
                line += f"  less {base.name}: {_with_interval(more[name], '+.4f')}"
            lines.append(line)
    return lines


def _with_interval(one: Estimate, form: str) -> str:
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"


# JSON -----------------------------------------------------------------------------------------------------------------
def as_json(
    reference: Reference, features: str, rows: Sequence[Row], groups: Mapping[str, Sequence[Row]], most: int
) -> dict[str, Any]:
    """What `--json` writes and `dgfast report` reads. subset: how many images the metrics of neighbours look at."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "reference": {"name": reference.name, "images": reference.images},
        "features": features,
        "subset": most,
        "rows": [_as_json(row, base) for row, base in zip(rows, bases(rows), strict=True)],
    }
    if groups:
        content["seed_ranges"] = [{"name": name, **over_ranges(group)} for name, group in groups.items()]
    return content


def _as_json(row: Row, base: Row | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": row.name,
        "folder": None if row.folder is None else str(row.folder),
        "images": row.images,
        "seeds": row.seeds,
        "metrics": _estimates(row.metrics),
        "settings": dict(row.settings),
    }
    if base is not None:
        content["difference"] = {"against": base.name, **_estimates(row.less(base))}
    return content


def _estimates(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in metrics.items()}
