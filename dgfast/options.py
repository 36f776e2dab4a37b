"""What the command lines share: help in sections, the types of their options, and the options of the guidances.

A formula's symbol is the metavar of its option. Behind an option's help stands what a bundle says where it is left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from dgfast import __version__, bounds
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import declaration
from dgfast.ranges import Ranges
from dgfast.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS


class Group(StrEnum):
    """The sections of `--help` beside those of the guidances, which come after the solver's."""

    INPUT = "Input"
    TRAINING = "Training"
    SOLVER = "Schedule and solver"
    RUNTIME = "Runtime"
    OUTPUT = "Output"
    OTHER = "Other"


class Option(click.Option):
    """An option in a section of `--help`; of one that a bundle has a default for, the help says it."""

    def __init__(self, *arguments: Any, group: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None or self.show_default or not isinstance(ctx.command, Command):
            return record
        bundle, defaults = ctx.command.bundled_defaults(ctx)
        value = _as_typed(defaults.get(self.name or ""))
        return (record[0], f"{record[1]}  [{bundle}: {value}]".strip()) if value else record


_version = click.version_option(__version__, message="dgfast %(version)s")


class Command(click.Command):
    """A command whose `--help` has sections and whose `--version` is dgfast's."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _version(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)  # --help comes to its turn before --bundle does
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in sections_of_help()}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # the text says what the arguments are
                sections[getattr(parameter, "group", Group.OTHER)].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(str(name)):
                    formatter.write_dl(records)

    def bundled_defaults(self, ctx: click.Context) -> tuple[str, Mapping[str, Any]]:
        """The name of the bundle on the command line, else of the one that comes along, and its defaults by name."""
        values, _, _ = self.make_parser(ctx).parse_args(list(ctx.meta.get(_ARGUMENTS, ())))
        folder = Path(values.get("bundle") or _BUNDLE)
        if not folder.is_dir():
            folder = Path(__file__).parent / "assets" / folder
        return folder.name, _defaults(folder / "bundle.json")


class CommandGroup(click.Group):
    """Commands of that kind under one name."""

    command_class = Command

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _version(self)


_ARGUMENTS = f"{__name__}.arguments"
_BUNDLE = "mnist32"


def _defaults(path: Path) -> Mapping[str, Any]:
    """Sampling and guidance of a `bundle.json`; nothing where it can't be read, for help needs no bundle."""
    try:
        bundle = bounds.read_json(path)
        own = bundle.get("sampling", {}) | bundle.get("guidance", {})
        return asdict(SamplingConfig()) | asdict(GuidanceConfig()) | own
    except (AttributeError, TypeError, ValueError):
        return {}


def _as_typed(value: Any) -> str:
    """A bundle's default as it would stand on the command line; nothing for what is open or empty."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(":".join(map(_as_typed, v)) if isinstance(v, list | tuple) else _as_typed(v) for v in value)
    return value if isinstance(value, str) and value.isprintable() else ""


def command_line() -> list[str]:
    """The running command's arguments, as they were typed."""
    return list(click.get_current_context().meta[_ARGUMENTS])


def sections_of_help() -> list[str]:
    """The sections in their order; a guidance's has its formula."""
    groups = list(Group)
    at = groups.index(Group.SOLVER) + 1
    return [*groups[:at], *map(_section, declaration.GUIDANCES), *groups[at:]]


def _section(guidance: type[declaration.Guidance]) -> str:
    return f"{guidance.name[:1].upper()}{guidance.name[1:]}, {guidance.formula}"


def option(*names: str, group: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`click.option`, in a section of `--help`."""
    return click.option(*names, cls=Option, group=group, **settings)


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
_TYPES = {float: NUMBER, int: int, str: str, declaration.PAIR: FloatPair(), declaration.POINTS: WeightPoints()}


class GuidedCommand(Command):
    """A command with what decides on a job's functions: the solver and all declared guidances.

    They are looked up when the command runs, so that a guidance declared since its making is among them.

    Args:
        exported: leave out what no exported file can do.
    """

    def __init__(self, *arguments: Any, exported: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._exported = exported
        solver, eta = "What integrates the ODE or SDE.", "Noise of the ddim solver, from 0 to 1."
        clip = "Keep denoised images in [-1, 1]; or =false."
        option("--solver", group=Group.SOLVER, type=click.Choice(tuple(SOLVERS)), help=solver)(self)
        option("--eta", group=Group.SOLVER, type=NUMBER, metavar="eta", help=eta)(self)
        noise, norm = "Noise of the flow-sde solvers along the path.", "Factor in --diffusion."
        last = "Their last step, without noise: of the SDE, of the ODE, to the denoised image, or no such step."
        option("--diffusion", group=Group.SOLVER, type=click.Choice(DIFFUSIONS), help=noise)(self)
        option("--diffusion-norm", group=Group.SOLVER, type=NUMBER, metavar="c", help=norm)(self)
        option("--last-step", group=Group.SOLVER, type=click.Choice(LAST_STEPS), help=last)(self)
        option("--clip-denoised", group=Group.SOLVER, type=bool, is_flag=False, flag_value="true", help=clip)(self)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own, guiding = super().get_params(ctx), [*_guidance_options(self._exported)]
        twice = {one.name for one in own} & {one.name for one in guiding}
        if twice:
            raise click.UsageError(f"a guidance has the option {min(map(str, twice))}, which this command has itself")
        return [*own, *guiding]


def _guidance_options(exported: bool) -> Iterator[Option]:
    sections: dict[str, str] = {}
    for guidance in declaration.GUIDANCES:
        for one in guidance.options():
            sections.setdefault(one.name, _section(guidance))  # some options are of two guidances
    for one in declaration.all_options():
        if one.exported or not exported:
            kind = {"is_flag": True, "default": None} if one.kind is bool else {"type": _TYPES[one.kind]}
            choices = {"type": click.Choice(one.choices)} if one.choices else {"metavar": one.symbol}
            name = f"--{one.name.replace('_', '-')}"
            yield Option([name], group=sections[one.name], help=one.help, **kind | choices)


EXPORTED_BUNDLE = option(
    "--bundle", group=Group.INPUT, default=_BUNDLE, show_default=True,
    help="Folder, or name of a bundle that comes along.",
)  # fmt: skip
"""Of which bundle to export a function."""

EXPORTED_OUT = option(
    "--out", group=Group.OUTPUT, type=click.Path(path_type=Path), default="exported", show_default=True,
    help="A folder.",
)  # fmt: skip
"""Where to leave the file."""

WHAT = option(
    "--what", group=Group.INPUT, type=click.Choice(["denoiser", "posterior", "velocity", "step", "generator"]),
    help="The guided denoiser; what the ddpm and the flow solvers call in its place; a whole step of the solver; the "
    "one-step generator.  [default: what the bundle's solver calls]",
)  # fmt: skip
"""Which function of a bundle to export."""
