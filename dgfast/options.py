"""What the command lines share: the types of their options, and the options that give guidances their weights."""

import math
from collections.abc import Callable
from typing import Any

import click


class IntegerRanges(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """Integers and inclusive ranges, such as 0-63,100."""

    name = "ranges"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                self.fail(f"{value!r}: expected integers and ranges such as 0-63,100", param, ctx)
            if dash and int(last) < int(first):
                self.fail(f"{value!r}: the range {part.strip()} ends before it begins", param, ctx)
            numbers.extend(range(int(first), int(last or first) + 1))
        return numbers


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
_WEIGHTS = {
    "--dg-weight": "Discriminator guidance; 0 turns it off.",
    "--dg-weight-2nd": "The same at the solver's second point.",
    "--classifier-scale": "Classifier guidance; 0 turns it off.",
    "--cfg-scale": "Classifier-free guidance; 1 turns it off.",
    "--autoguidance": "Guidance by a worse net; 1 turns it off.",
}


def guidance_weights(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that give each guidance its weight, for every command that takes them."""
    for option, text in reversed(_WEIGHTS.items()):
        command = click.option(option, type=NUMBER, help=text)(command)
    return command
