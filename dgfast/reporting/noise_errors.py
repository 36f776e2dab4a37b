"""What `python -m benchmarks.gpu` found of errors by noise level: of one guided call, and of a run's state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgfast.errors import UserError, one_line

PART = "parity by noise level"
_SIGMA = "sigma, error of the "


@dataclass(frozen=True)
class NoiseErrors:
    """Errors against eager float32.

    Attributes:
        of: "call" or "state". sigmas: noise levels. errors: runtime and number format -> an error a noise level.
        origin: the machine and the versions, as far as the file has them.
    """

    of: str
    sigmas: Sequence[float]
    errors: Mapping[str, Sequence[float]]
    origin: str


def parse(path: Path, content: Mapping[str, Any]) -> list[NoiseErrors]:
    """
    Raises:
        UserError: the file has no such part, or one that did not end well.
    """
    try:
        parts = content["parts"]
        rows = [dict(row) for row in parts.get(PART, {}).get("rows", ())]
        facts = [row for part in parts.values() for row in part.get("rows", ()) if {*row} == {"fact", "value"}]
        kinds = list(dict.fromkeys(name for row in rows for name in row if name.startswith(_SIGMA)))
        origin = ", ".join(f"{row['fact']} {row['value']}" for row in facts if row["value"] != "None")
        found = [_of_kind([row for row in rows if kind in row], kind, origin) for kind in kinds]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of `python -m benchmarks.gpu` ({one_line(repr(error))})") from error
    if not found:
        raise UserError(f'{path} has no rows of "{PART}": run python -m benchmarks.gpu --part "{PART}" --out FOLDER')
    return found


def _of_kind(rows: Sequence[Mapping[str, Any]], kind: str, origin: str) -> NoiseErrors:
    names = [name for name in rows[0] if name != kind]
    columns = {name: [float(row[name]) for row in rows] for name in (kind, *names)}
    if not all(math.isfinite(number) and number >= 0 for column in columns.values() for number in column):
        raise ValueError("an error or a noise level is no number from 0 on")
    return NoiseErrors(kind.removeprefix(_SIGMA), columns.pop(kind), columns, origin)
