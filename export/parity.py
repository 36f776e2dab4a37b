"""One checker for every runtime: does it return what the reference does, in name, type, shape and value?

report = compare(reference, candidate, cases, tolerance=1e-4)
print(report.table())
report.check()  # raises the first thing that is wrong, under its own name
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.graph.agreement import relative_error

Tensors = Mapping[str, Tensor]
Runs = Callable[[Tensors], Tensors]
"""Outputs by name of inputs by name."""


class ParityError(UserError):
    """An exported file is not what it should be."""

    exit_code = 1


class NameMismatchError(ParityError):
    """An input or output is missing, superfluous or out of order."""


class AxesMismatchError(ParityError):
    """A size is open where it should be fixed, or the other way round."""


class DtypeMismatchError(ParityError):
    """A tensor has another type of number."""


class ShapeMismatchError(ParityError):
    """A result has another shape."""


class ValueMismatchError(ParityError):
    """A result differs by more than the tolerance."""


@dataclass(frozen=True)
class Case:
    """Inputs by name, none of them those of the tracing example.

    Attributes:
        least: see `agreement.least_sizes`.
    """

    name: str
    inputs: Tensors
    least: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One output of one case.

    Attributes:
        error: see `agreement.relative_error`; of a whole run, the largest difference as a share of the pixel range.
        problem: name of the error class, "" if there is none.
    """

    case: str
    output: str
    error: float
    tolerance: float
    problem: str = ""
    detail: str = ""


_ERRORS = {
    e.__name__: e
    for e in (NameMismatchError, AxesMismatchError, DtypeMismatchError, ShapeMismatchError, ValueMismatchError)
}


@dataclass(frozen=True)
class Report:
    """What was compared and how it went; `about` is what else a reader should know."""

    rows: list[Row]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not any(row.problem for row in self.rows)

    @property
    def worst(self) -> dict[str, float]:
        """Largest error of each output."""
        return {
            output: max(row.error for row in self.rows if row.output == output)
            for output in dict.fromkeys(row.output for row in self.rows)
        }

    def json(self) -> str:
        return json.dumps({**self.about, "passed": self.passed, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def table(self) -> str:
        """Aligned text, one line a case and output."""
        lines = [("case", "output", "error", "allowed", "")]
        lines += [(r.case, r.output, f"{r.error:.1e}", f"{r.tolerance:.0e}", r.problem or "ok") for r in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*(f"{key}: {value}" for key, value in self.about.items()), *text]) + "\n"

    def write(self, path: Path, metadata: Mapping[str, str], **about: object) -> None:
        """Write it beside an exported file, as JSON and as text, with what is known of the file."""
        said = ("bundle", "what", "weights_sha256", "commit")
        self.about.update({key: metadata[key] for key in said if key in metadata}, **about)
        path.with_suffix(".parity.json").write_text(self.json() + "\n")
        path.with_suffix(".parity.txt").write_text(self.table())

    def check(self) -> None:
        """Raises the error that the first bad row is named after."""
        for row in self.rows:
            if row.problem:
                raise _ERRORS[row.problem](f"{row.case}: {row.output}: {row.detail}")


def compare(
    reference: Runs,
    candidate: Runs,
    cases: Sequence[Case],
    tolerance: float | Mapping[str, float],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Report:
    """Run both on all cases and compare every output.

    Args:
        tolerance: for every output, or by its name.
        dtypes: of the candidate's outputs, by name; None does not look at them.
    """
    rows: list[Row] = []
    for case in cases:
        expected, results = reference(case.inputs), candidate(case.inputs)
        if list(expected) != list(results):
            detail = f"outputs {', '.join(results)}, not {', '.join(expected)}"
            rows.append(Row(case.name, "outputs", float("inf"), 0.0, NameMismatchError.__name__, detail))
            continue
        for name, value in expected.items():
            allowed = tolerance if isinstance(tolerance, float | int) else tolerance[name]
            dtype, least = (dtypes or {}).get(name), case.least.get(name)
            rows.append(_row(case.name, name, value, results[name], allowed, dtype, least))
    return Report(rows)


def signature(
    expected: Mapping[str, tuple[Any, Any]], found: Mapping[str, tuple[Any, Any]], what: str
) -> Iterator[Row]:
    """Rows for what is wrong about inputs or outputs, each given as sizes (a name where open) and type."""
    if list(expected) != list(found):
        detail = f"{', '.join(found)}, not {', '.join(expected)}"
        yield Row("signature", what, float("inf"), 0.0, NameMismatchError.__name__, detail)
        return
    for name, (sizes, dtype) in expected.items():
        have, kind = found[name]
        if kind != dtype:
            yield Row("signature", name, float("inf"), 0.0, DtypeMismatchError.__name__, f"{kind}, not {dtype}")
        if [isinstance(s, str) for s in sizes] != [isinstance(s, str) for s in have]:
            detail = f"axes {list(have)}, not {list(sizes)}"
            yield Row("signature", name, float("inf"), 0.0, AxesMismatchError.__name__, detail)
        elif [s for s in sizes if isinstance(s, int)] != [s for s in have if isinstance(s, int)]:
            detail = f"{list(have)}, not {list(sizes)}"
            yield Row("signature", name, float("inf"), 0.0, ShapeMismatchError.__name__, detail)


def _row(
    case: str, name: str, wanted: Tensor, found: Tensor, tolerance: float, dtype: torch.dtype | None,
    least: Tensor | None,
) -> Row:  # fmt: skip
    if dtype is not None and found.dtype != dtype:
        return Row(case, name, float("inf"), tolerance, DtypeMismatchError.__name__, f"{found.dtype}, not {dtype}")
    if found.shape != wanted.shape:
        detail = f"shape {list(found.shape)}, not {list(wanted.shape)}"
        return Row(case, name, float("inf"), tolerance, ShapeMismatchError.__name__, detail)
    error = relative_error(found, wanted, least)
    if not error <= tolerance:
        detail = f"differs by {error:.1e} of the reference, allowed {tolerance:.0e}"
        return Row(case, name, error, tolerance, ValueMismatchError.__name__, detail)
    return Row(case, name, error, tolerance)
