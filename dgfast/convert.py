"""Put an official checkpoint into a bundle, without running code from it.

FILE is a network snapshot of NVIDIA's EDM or EDM2 (.pkl), which says itself what it is, or a state dict, bare or in a
training checkpoint (.pt, .pth, .ckpt, .bin, .safetensors), whose --role must be given. OpenAI's score networks and
classifiers, DG's discriminators, EDM2, DiT and SiT are known by their shapes; any other needs --kind and the
constructor's keywords. FILE may be a folder of diffusers: a DDPM or DiT pipeline, or the network in it. What no file
says is printed, and how to change it. Convert each file with the same --out to join them in one bundle. Several files
are snapshots of one training of EDM2, of which --phema-std makes one average.
"""

import json
from pathlib import Path
from typing import Any

import click

from dgfast.checkpoints import DENOISERS, ENCODERS, one_line
from dgfast.errors import UserError
from dgfast.option_types import NUMBER, PATH
from dgfast.options import Command, Group, option

_PYTHON = {"True": True, "False": False, "None": None}  # as guided-diffusion's command lines have them


@click.command(cls=Command, help=__doc__)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=PATH)
@option("--role", group=Group.INPUT, type=click.Choice(DENOISERS + ENCODERS), help="Default for a snapshot: score.")
@option("--key", group=Group.INPUT, help="Part of FILE to take: ema, state_dict.net, ...; default: ema, if it has one.")
@option(
    "--kind", group=Group.INPUT, help="EDMPrecond, iDDPMPrecond, DDPMPrecond, FlowPrecond, DiT, EncoderUNetModel, ..."
)
@option(
    "--config",
    group=Group.INPUT,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keywords of the network's constructor as JSON.",
)
@option(
    "--set", "settings", group=Group.INPUT, multiple=True, metavar="KEY=VALUE", help="One keyword more; VALUE as JSON."
)
@option(
    "--time-schedule",
    group=Group.INPUT,
    type=click.Choice(["linear", "cosine"]),
    help="The time that a classifier reads; default: that of the bundle's score network.",
)
@option(
    "--vae",
    group=Group.INPUT,
    help="What decodes the latents of a score network: folder or hub name of an AutoencoderKL.",
)
@option(
    "--phema-std",
    group=Group.INPUT,
    type=NUMBER,
    metavar="STD",
    help="Relative standard deviation of the average over training to make of EDM2's snapshots.",
)
@option(
    "--phema-kimg",
    group=Group.INPUT,
    type=int,
    metavar="KIMG",
    help="Thousands of images after which to make it; default: of the latest snapshot.",
)
@option("--out", group=Group.OUTPUT, required=True, type=PATH, help="Folder of the bundle, new or not.")
@option("--name", group=Group.OUTPUT, help="Name of a new bundle; default: that of FILE.")
@option("--license", "license_", group=Group.OUTPUT, help="License of the weights.")
@option("--provenance", group=Group.OUTPUT, help="Where they come from; default: the name of FILE.")
def main(
    files: tuple[Path, ...],
    out: Path,
    role: str | None,
    key: str | None,
    kind: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    time_schedule: str | None,
    vae: str | None,
    phema_std: float | None,
    phema_kimg: int | None,
    name: str | None,
    license_: str | None,
    provenance: str | None,
) -> None:
    told = _keywords(config, settings)
    file = files[-1]
    if phema_std is None and len(files) > 1:
        raise UserError(f"{len(files)} files: convert one at a time, or make one average of EDM2's with --phema-std")
    if phema_std is None and phema_kimg is not None:
        raise UserError("--phema-kimg says when an average is to end that --phema-std asks for: give both")
    for one in files:
        role = _role(one, role, kind, told, key)
    assert role is not None
    if time_schedule and role != "classifier":
        raise UserError(f"--time-schedule is for a classifier; a {role} network has none of its own")
    if vae and role != "score":
        raise UserError(f"--vae is for a score network of latents; a {role} network makes none")

    from dgfast.checkpoints import (
        diffusers_folder,
        joining,
        network,
    )  # torch takes longer to import than --help may take
    from dgfast.checkpoints.account import account

    joining.room(out, role, name)  # asked before a large file is read
    if phema_std is not None:
        converted, made = network.average(files, role, phema_std, phema_kimg)
        origin = provenance or made
    else:
        if diffusers_folder.is_one(file):
            converted = diffusers_folder.read(file, role, told)
            vae = vae or (diffusers_folder.vae_of(file) if role == "score" else None)
        else:
            converted = network.read(file, role, kind, told, key)
        origin = provenance or f"converted from {one_line(file.name)}"
    assumed = joining.join(
        converted, out, role, name=name, fallback_name=one_line(file.stem) or "bundle", provenance=origin,
        license_=license_, time_schedule=time_schedule, vae=vae,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in converted.net.parameters())
    click.echo(f"{out}: {role} {converted.kind}, {parameters:,} parameters")
    click.echo(account(converted.read, assumed))


def _role(file: Path, role: str | None, kind: str | None, told: dict[str, Any], key: str | None) -> str:
    """The network's role in the bundle, once it is clear that the file and the options go together."""
    from dgfast.checkpoints import diffusers_folder
    from dgfast.checkpoints.foreign import file_format

    if diffusers_folder.is_one(file):
        if kind or key:
            raise UserError(f"{file} is a folder, which says itself what it is: leave out --kind and --key")
        return role or "score"
    if file_format(file) == "snapshot":
        if kind or told or key:
            raise UserError(f"{file} says itself what it is: leave out --kind, --config, --set and --key")
        return role or "score"
    if role is None:
        raise UserError(f"{file} does not say what it is for: give --role {', '.join(DENOISERS + ENCODERS)}")
    return role


def _keywords(config: Path | None, settings: tuple[str, ...]) -> dict[str, Any]:
    """The constructor's keywords from the command line; --set goes over --config."""
    keywords: dict[str, Any] = {}
    if config is not None:
        try:
            keywords = json.loads(config.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{config} is not readable JSON: {error}") from error
        if not isinstance(keywords, dict):
            raise UserError(f"{config} must hold an object: the constructor's keywords and their values")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise UserError(f"--set {setting}: expected KEY=VALUE, such as --set image_size=64")
        try:
            keywords[key] = _PYTHON[value] if value in _PYTHON else json.loads(value)
        except (ValueError, RecursionError):
            keywords[key] = value
    try:
        json.dumps(keywords, allow_nan=False)
    except ValueError as error:
        raise UserError("a bundle holds finite keywords only: leave out what is infinite by default") from error
    return keywords


if __name__ == "__main__":
    main()
