"""What may stand behind an option of the command lines: numbers, ranges of them, times, paths."""

import math
from pathlib import Path
from typing import Any

import click

from dgfast.ranges import Ranges

_MOST_TEXT = 2**24  # of numbers in a file: a device may have no end


class IntegerRanges(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """Integers and inclusive ranges, such as 0-63,100, or @FILE, a file of them.

    Args:
        below: numbers must be less; otherwise is the sentence that says why.
    """

    name = "ranges"

    def __init__(self, below: int | None = None, otherwise: str = "") -> None:
        self._below, self._otherwise = below, otherwise

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Ranges:
        if isinstance(value, Ranges):
            return value
        text = str(value)
        try:
            if text.startswith("@"):
                with Path(text[1:]).open() as file:
                    text = file.read(_MOST_TEXT + 1)
                if len(text) > _MOST_TEXT:
                    raise ValueError(f"longer than {_MOST_TEXT:,} characters")
            numbers = Ranges.parse(text)
        except OSError as error:
            self.fail(f"{text[1:]}: can't be read ({error.strerror})", param, ctx)
        except ValueError as error:  # also of a file that is no text
            reason = "no text" if isinstance(error, UnicodeDecodeError) else str(error)
            self.fail(f"{value}: {reason}" if str(value).startswith("@") else reason, param, ctx)
        if self._below is not None and numbers.largest >= self._below:
            self.fail(f"{numbers.largest}: {self._otherwise}", param, ctx)
        return numbers


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """A time such as 90s, 30m or 2.5h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        units = {"s": 1.0, "m": 60.0, "h": 3600.0}
        try:
            seconds = float(value[:-1]) * units[value[-1:]]
        except (ValueError, KeyError):
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self.fail(f"{value!r}: expected a time such as 90s, 30m or 2.5h", param, ctx)
        return seconds


class FloatPair(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """Two numbers, such as 0.01,1; `inf` is allowed."""

    name = "low,high"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            low, high = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected two numbers such as 0.01,1", param, ctx)
        return low, high


class WeightPoints(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """Points of a schedule, such as 0.1:0,0.5:1."""

    name = "tau:factor,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            points = tuple(tuple(float(number) for number in point.split(":")) for point in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected points such as 0.1:0,0.5:1", param, ctx)
        return points


class FiniteFloat(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """A number, neither infinite nor NaN."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


NUMBER = FiniteFloat()
PATH = click.Path(path_type=Path)
