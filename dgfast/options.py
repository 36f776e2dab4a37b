"""What the command lines share: the types of their options, and the options of the guidances."""

import math
from collections.abc import Callable
from typing import Any

import click

from dgfast.config import CLEAN_TIMES, NORMALIZATIONS


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
_GUIDANCE = (
    click.option("--dg-weight", type=NUMBER, help="Discriminator guidance; 0 turns it off."),
    click.option("--dg-weight-2nd", type=NUMBER, help="The same at the solver's second point."),
    click.option("--dg-window", type=FloatPair(), help="VP times between which it acts."),
    click.option("--dg-schedule", type=WeightPoints(), help="Factor on --dg-weight by VP time, linear between points."),
    click.option("--boosting", is_flag=True, default=None, help="DG's boosting, for conditional nets."),
    click.option(
        "--published-window", is_flag=True, default=None, help="Judge the window by the batch, as DG's code does."
    ),
    click.option("--classifier-scale", type=NUMBER, help="Classifier guidance; 0 turns it off."),
    click.option("--classifier-schedule", type=WeightPoints(), help="Factor on --classifier-scale, as --dg-schedule."),
    click.option("--cfg-scale", type=NUMBER, help="Classifier-free guidance; 1 turns it off."),
    click.option("--cfg-scale-low", type=NUMBER, help="The same at noise levels of --cfg-branch and below."),
    click.option("--cfg-branch", type=NUMBER, help="Noise level sigma at which the one scale takes over."),
    click.option("--cfg-channels", type=int, help="Guide the first so many channels alone; 3 is DiT's published way."),
    click.option("--guidance-interval", type=FloatPair(), help="Noise levels sigma between which --cfg-scale acts."),
    click.option("--autoguidance", type=NUMBER, help="Guidance by a worse net; 1 turns it off."),
    click.option("--diversity", type=NUMBER, help="Low-density guidance, a: away from what the classifier is sure of."),
    click.option("--perceptual", is_flag=True, default=None, help="Turn --diversity round: toward the class."),
    click.option("--fidelity", type=NUMBER, help="Guidance toward the class in the predicted clean image, b."),
    click.option("--normalize", type=click.Choice(NORMALIZATIONS), help="What both do to their gradients' lengths."),
    click.option(
        "--clean-time", type=click.Choice(CLEAN_TIMES), help="Classifier's time for the predicted clean image."
    ),
    click.option("--target-class", type=int, help="Class of the --diversity term; default: each image's own."),
    click.option("--base-class", type=int, help="Class of the --fidelity term; default: each image's own."),
)


def guidance_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What decides on the guided function, for every command that makes one: guidance, and what stands before it."""
    command = click.option(
        "--clip-denoised", type=bool, is_flag=False, flag_value="true",
        help="Keep denoised images in [-1, 1]; or =false.",
    )(command)  # fmt: skip
    for option in reversed(_GUIDANCE):
        command = option(command)
    return command


def function_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which function of a bundle to export, and under which guidance."""
    what = click.option(
        "--what", type=click.Choice(["denoiser", "posterior", "step", "generator"]),
        help="The guided denoiser; what the ddpm solver calls in its place; a whole step of heun or euler; the "
        "one-step generator.  [default: what the bundle's solver calls]",
    )  # fmt: skip
    return what(guidance_options(command))
