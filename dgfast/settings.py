"""How a command line makes sampling and guidance: a preset's or the bundle's own, under what it gives."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import click

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance.declaration import overridden
from dgfast.options import names_as_typed

if TYPE_CHECKING:
    from dgfast.bundle import Bundle

Settings = tuple[SamplingConfig, GuidanceConfig]


def settings_of(bundle: "Bundle", given: Mapping[str, Any]) -> Settings | None:
    """Sampling and guidance of a job; None for a generator, which has neither.

    Args:
        given: the values of the running command's options, by the fields' names.

    Raises:
        UserError: options that nothing takes, or that contradict one another; no such preset.
    """
    of_sampling, of_guidance = _chosen(given, SamplingConfig), _chosen(given, GuidanceConfig)
    if given.get("one_step"):
        _require_none({*of_sampling, *of_guidance, "preset"} & {*given})
        return None
    sampling, guidance = _preset(bundle, given["preset"]) if "preset" in given else (bundle.sampling, bundle.guidance)
    return _sampling(sampling, of_sampling), overridden(guidance, of_guidance)


def _chosen(given: Mapping[str, Any], record: type[SamplingConfig] | type[GuidanceConfig]) -> dict[str, Any]:
    return {field.name: given[field.name] for field in fields(record) if field.name in given}


def _require_none(idle: set[str]) -> None:
    """Raises UserError for options of a solver or a guidance beside `--one-step`."""
    if names := [typed for name, typed in names_as_typed().items() if name in idle]:
        raise UserError(f"--one-step has no solver and no guidance: leave out {', '.join(names)}, or --one-step")


def _preset(bundle: "Bundle", name: str) -> Settings:
    """Sampling and guidance of a preset.

    Raises:
        UserError: no such preset, or one of other networks than the bundle's.
    """
    from dgfast import presets

    chosen = presets.preset(name)
    presets.require_fit(name, {role: (net.kind, net.keywords) for role, net in bundle.nets.items()}, str(bundle.folder))
    for note in presets.other_files(name, bundle.provenance):
        click.echo(note, err=True)
    return SamplingConfig(**presets.SAMPLING), GuidanceConfig(autoguidance=chosen.weight)


def _sampling(bundled: SamplingConfig, given: Mapping[str, Any]) -> SamplingConfig:
    """The bundle's sampling with what the command line gives, which names one grid alone."""
    changes = dict(given)
    grid = {"discretization", "sigma_min", "sigma_max", "rho"} & {*given}
    if "respacing" in given and (grid or "num_steps" in given):
        raise UserError("--respacing is the whole grid: leave out --steps, --grid, --sigma-min, --sigma-max and --rho")
    if bundled.respacing is not None and "respacing" not in given:
        if grid:
            changes["respacing"] = None
        elif "num_steps" in given:
            changes["respacing"] = str(given["num_steps"])
    return replace(bundled, **changes)
