"""What the command lines share: help in sections, and options that several of them have.

A formula's symbol is the metavar of its option. Behind an option's help stands what a bundle says where it is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from dgfast import __version__, bounds
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import declaration
from dgfast.option_types import PATH


class Group(StrEnum):
    """The sections of `--help` beside those of the guidances, which come after the solver's."""

    INPUT = "Input"
    TRAINING = "Training"
    SOLVER = "Schedule and solver"
    RUNTIME = "Runtime"
    OUTPUT = "Output"
    OTHER = "Other"


class Option(click.Option):
    """An option in a section of `--help`, which says its default: its own, or what a bundle has for it."""

    def __init__(self, *arguments: Any, group: str, **settings: Any) -> None:
        settings.setdefault("show_default", settings.get("default") not in (None, "", "{}"))
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


def names_as_typed() -> dict[str, str]:
    """The running command's options as a user types them, by the names of their values: --steps of num_steps."""
    context = click.get_current_context()
    return {one.name: one.opts[0] for one in context.command.get_params(context) if one.name}


def command_line() -> list[str]:
    """The running command's arguments, as they were typed."""
    return list(click.get_current_context().meta[_ARGUMENTS])


def sections_of_help() -> list[str]:
    """The sections in their order; a guidance's has its formula."""
    groups = list(Group)
    at = groups.index(Group.SOLVER) + 1
    return [*groups[:at], *map(section, declaration.GUIDANCES), *groups[at:]]


def section(guidance: type[declaration.Guidance]) -> str:
    """The name of its section."""
    return f"{guidance.name[:1].upper()}{guidance.name[1:]}, {guidance.formula}"


def option(*names: str, group: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`click.option`, in a section of `--help`."""
    return click.option(*names, cls=Option, group=group, **settings)


BUNDLE = option("--bundle", group=Group.INPUT, default=_BUNDLE, help="Folder, or name of a bundle that comes along.")
"""Of which bundle to draw, or to export a function."""

EXPORTED_OUT = option("--out", group=Group.OUTPUT, type=PATH, default="exported", help="A folder.")
"""Where to leave the file."""

WHAT = option(
    "--what", group=Group.INPUT, type=click.Choice(["denoiser", "posterior", "velocity", "step", "generator"]),
    help="The guided denoiser; what the ddpm and the flow solvers call in its place; a whole step of the solver; the "
    "one-step generator.  [default: what the bundle's solver calls]",
)  # fmt: skip
"""Which function of a bundle to export."""
