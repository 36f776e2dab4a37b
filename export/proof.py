"""The values of an exported file against eager: calls that it has not seen, and a whole run."""

from dgfast.export.parity import Row, Runs, compare
from dgfast.export.subject import Subject
from dgfast.functions.compiled import DOUBLE

TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}
"""Most that an output may be off, see `parity.Row`: in the other types than float32 what eager's own rounding makes."""
TRAJECTORY_TOLERANCES = {"float32": 2e-3, "fp16": 1e-2, "bf16": 1e-1}
"""The same for a whole run, as a share of the pixel range, which is 2. In 16 bits one image in ten may be off by
more: rounding is enough for a few of many to take another way where they decide on what they show."""
OPEN_BATCHES = 1, 5


def tolerance(dtype: str) -> float:
    """The most that an output may be off; functions of users may be in double precision, too."""
    return DOUBLE if dtype == "float64" else TOLERANCES[dtype]


def value_rows(engine: Runs, subject: Subject, batch: int | None, dtype: str) -> list[Row]:
    """
    Args:
        batch: that the file was made for; None: any.
    """
    sizes = [batch] if batch else list(OPEN_BATCHES)
    cases = [case for size in sizes for case in subject.cases(size)]
    rows = compare(subject, engine, cases, tolerance(dtype), subject.dtypes()).rows
    allowed, share = TRAJECTORY_TOLERANCES.get(dtype, 0.0), 0.9 if dtype in ("fp16", "bf16") else 1.0
    return rows + subject.whole_run(subject, engine, batch or 1, allowed, share)
