"""The options that a guidance declares, for command lines, `GuidanceConfig`, bundles and exported files."""

import math
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_type_hints

from dgfast.errors import UserError

T = TypeVar("T")
PAIR = tuple[float, float]
POINTS = tuple[tuple[float, float], ...]
MOST_POINTS = 20
"""Points of a schedule of weights, far more than anyone draws: a file may bring a million."""


@dataclass(frozen=True)
class Option:
    """One option: of the command line, of `GuidanceConfig` and of a bundle's json.

    Attributes:
        kind: its type, one of float, int, bool, str, `PAIR` and `POINTS`; any of them may be optional.
        symbol: of the formula. choices: all values that it may have. least: the smallest whole number that it may be.
        attribute: of the guidance, which then is a weight and under `input` an input of an exported file. off: the
            value of that weight that guides nothing. second: it holds at the solver's second point alone.
        inside: another value needs another exported file. exported: there are such files at all.
        file: it names a file, whose content counts and not its name. No bundle may have one.
        of_network: it fits the network, so that a bundle has it whether or not its guidance is on; of all others
            a `GuidanceConfig` whose guidance is off has the default.
    """

    name: str
    kind: Any
    default: Any
    help: str
    symbol: str | None
    choices: tuple[str, ...]
    least: int | None
    attribute: str | None
    input: str
    off: float
    second: bool
    inside: bool
    exported: bool
    file: bool
    of_network: bool

    def check(self, value: Any) -> None:
        """Raises UserError for a value that it may not have."""
        if value is None and self.default is None:
            return
        if self.file and not (isinstance(value, str) and value.isprintable()):
            raise UserError(f"{self.name} {value!r:.80} is not the name of a file")
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} {value!r} is not one of {', '.join(self.choices)}")
        if self.kind is float and not math.isfinite(value):
            raise UserError(f"{self.name} {value} is not a finite number")
        if self.kind is int and (not isinstance(value, int) or (self.least is not None and value < self.least)):
            raise UserError(f"{self.name} {value} must be a whole number, at least {self.least}")
        if self.kind == PAIR and (len(value) != 2 or not value[0] < value[1]):
            raise UserError(f"{self.name} {value}: give two numbers, the first below the second")
        if self.kind == POINTS:
            numbers = all(len(point) == 2 and all(map(math.isfinite, point)) for point in value)
            if not numbers or len(value) > MOST_POINTS or any(b[0] < a[0] for a, b in pairwise(value)):
                raise UserError(
                    f"{self.name} {str(value)[:80]}: give at most {MOST_POINTS} pairs of numbers, time tau and factor, "
                    "by rising tau"
                )


def option(
    default: T, help: str, symbol: str | None = None, *, choices: tuple[str, ...] = (), least: int | None = None,
    attribute: str | None = None, input: str | None = None, off: float | None = None, second: bool = False,
    inside: bool = True, exported: bool = True, file: bool = False, of_network: bool = False,
) -> T:  # fmt: skip
    """A field of a guidance's `Options`, see `Option`; with the default, a guidance does nothing."""
    about = {
        "help": help, "symbol": symbol, "choices": choices, "least": least, "attribute": attribute, "input": input,
        "off": default if off is None else off, "second": second, "inside": inside and exported and not attribute,
        "exported": exported, "file": file, "of_network": of_network,
    }  # fmt: skip
    return field(default=default, metadata=about)


def declared(options: Any) -> tuple[Option, ...]:
    """Those of a dataclass of `option`s, in their order."""
    kinds = get_type_hints(options)
    return tuple(
        Option(f.name, _required(kinds[f.name]), f.default, **{**f.metadata, "input": f.metadata["input"] or f.name})
        for f in fields(options)
    )


def _required(kind: Any) -> Any:
    """float of `float | None`."""
    return next((one for one in get_args(kind) if type(None) in get_args(kind) and one is not type(None)), kind)
