"""Put an official checkpoint into a bundle, without running code from it.

FILE is a network snapshot of NVIDIA's EDM (.pkl), which says itself what it is, or a state dict (.pt, .safetensors),
whose --role must be given. OpenAI's score networks and classifiers, DG's discriminators and DiT are known by their
shapes; any other state dict needs --kind and the constructor's keywords. Convert each file with the same --out to join
them in one bundle.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.options import Command, Group, option

if TYPE_CHECKING:  # torch takes longer to import than --help may take
    from torch import nn

    from dgfast.bundle import Bundle

_DENOISERS = ("score", "reference")
_ENCODERS = ("classifier", "discriminator")
_STATE_DICTS = (".pt", ".pth", ".safetensors")
_DIT_WINDOW = (0.1011, 2.0)  # DiT-G++ guides at timesteps above 100: tau is 0.1006 at 100, 0.1016 at 101, 1.0034 at 999


@click.command(cls=Command, help=__doc__)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option(
    "--out",
    group=Group.OUTPUT,
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the bundle, new or not.",
)
@option("--role", group=Group.INPUT, type=click.Choice(_DENOISERS + _ENCODERS), help="Default for .pkl: score.")
@option("--kind", group=Group.INPUT, help="EDMPrecond, iDDPMPrecond, DDPMPrecond, DiT, EncoderUNetModel, ...")
@option(
    "--config",
    group=Group.INPUT,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keywords as JSON.",
)
@option(
    "--set", "settings", group=Group.INPUT, multiple=True, metavar="KEY=VALUE", help="One keyword more; VALUE as JSON."
)
@option(
    "--time-schedule",
    group=Group.INPUT,
    type=click.Choice(["linear", "cosine"]),
    help="The time that a classifier reads.",
)
@option(
    "--vae",
    group=Group.INPUT,
    help="What decodes the latents of a score network: folder or hub name of an AutoencoderKL.",
)
@option("--name", group=Group.OUTPUT, help="Name of a new bundle; default: that of FILE.")
@option("--license", "license_", group=Group.OUTPUT, help="License of the weights.")
@option("--provenance", group=Group.OUTPUT, help="Where they come from; default: the name of FILE.")
def main(
    file: Path,
    out: Path,
    role: str | None,
    kind: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    time_schedule: str | None,
    vae: str | None,
    **texts: str | None,
) -> None:
    given = _keywords(config, settings)
    if file.suffix == ".pkl":
        if kind or given:
            raise UserError(f"{file} says itself what it is: leave out --kind, --config and --set")
        role = role or "score"
    elif file.suffix not in _STATE_DICTS:
        raise UserError(f"{file}: unknown ending {file.suffix!r}; use .pkl or {', '.join(_STATE_DICTS)}")
    elif role is None:
        raise UserError(f"{file} does not say what it is for: give --role {', '.join(_DENOISERS + _ENCODERS)}")
    if time_schedule and role != "classifier":
        raise UserError(f"--time-schedule is for a classifier; a {role} network has none of its own")
    if vae and role != "score":
        raise UserError(f"--vae is for a score network of latents; a {role} network makes none")
    bundle = _bundle(out, role, file, **texts)
    net, kind, keywords = _network(file, role, kind, given)
    if role == "classifier" and time_schedule is None:
        time_schedule = "cosine" if keywords["image_size"] == 64 else "linear"  # what ADM trained them on
    if role == "score":
        bundle = _with_defaults(bundle, kind, keywords, vae)
    _write(bundle, role, net, kind, keywords, time_schedule)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    click.echo(f"{out}: {role} {kind}, {parameters:,} parameters")


def _with_defaults(bundle: "Bundle", kind: str, keywords: Mapping[str, Any], vae: str | None) -> "Bundle":
    """The bundle with what decodes such a score network's latents and how its authors sample from it."""
    from dgfast.bundle import VaeSpec

    bundle = replace(bundle, vae=VaeSpec(vae) if vae else bundle.vae)
    if bundle.guidance == GuidanceConfig() and keywords.get("model_type") == "DiT":
        bundle = replace(bundle, guidance=GuidanceConfig(dg_window=_DIT_WINDOW))
    if bundle.sampling == SamplingConfig():
        bundle = replace(bundle, sampling=_published_sampling(kind, keywords))
    return bundle


def _published_sampling(kind: str, keywords: Mapping[str, Any]) -> SamplingConfig:
    """How the authors of such a score network sample from it."""
    if kind == "DDPMPrecond":
        return SamplingConfig(solver="ddpm", respacing="250", clip_denoised=keywords["model_type"] != "DiT")
    # EDM's own numbers of steps, for CIFAR-10 and for FFHQ and AFHQ
    return SamplingConfig(num_steps=18 if keywords["img_resolution"] < 64 else 40)


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
            keywords[key] = json.loads(value)
        except (ValueError, RecursionError):
            keywords[key] = value
    try:
        json.dumps(keywords, allow_nan=False)
    except ValueError as error:
        raise UserError("a bundle holds finite keywords only: leave out what is infinite by default") from error
    return keywords


def _bundle(
    out: Path, role: str, file: Path, name: str | None, license_: str | None, provenance: str | None
) -> "Bundle":
    """The bundle in `out`, or a new one, with the texts about the network to come.

    Raises:
        UserError: no room for that network in `out`.
    """
    from dgfast import bundle as bundles

    if (out / "bundle.json").is_file():
        bundle = bundles.read(out)
        if name not in (None, bundle.name):
            raise UserError(f"{out} holds the bundle {bundle.name!r} already; leave out --name, or use another --out")
    else:
        bundle = bundles.Bundle(folder=out, name=name or file.stem, nets={})
    if role in bundle.nets or (out / f"{role}.safetensors").exists():
        raise UserError(f"{out} has a {role} network already; nothing was replaced. Use another --out")

    def extended(text: str, more: str | None) -> str:
        return "; ".join(filter(None, [text, more and f"{role}: {more}"]))

    return replace(
        bundle,
        provenance=extended(bundle.provenance, provenance or f"converted from {file.name}"),
        license=extended(bundle.license, license_),
    )


def _network(
    file: Path, role: str, kind: str | None, given: Mapping[str, Any]
) -> "tuple[nn.Module, str, dict[str, Any]]":
    """The network in `file` with its weights, and what `nets.build` made it from.

    Raises:
        UserError: unreadable, unsuited to the role, or of another shape than its keywords say.
    """
    from dgfast import bundle as bundles
    from dgfast import denoiser, nets
    from dgfast.checkpoints import dit, nvidia_pickle, one_line, openai_pt

    keywords = dict(given)
    if file.suffix == ".pkl":
        snapshot = nvidia_pickle.read(file)
        kind, keywords, tensors = snapshot.kind, snapshot.keywords, snapshot.tensors
    else:
        tensors = openai_pt.read(file)
        if role in _DENOISERS and (kind == "DiT" or (kind is None and dit.is_dit(tensors))):
            kind, keywords = "DDPMPrecond", dit.score_keywords(tensors, given, file)
        if kind is None and role in _DENOISERS:
            kind, keywords = "DDPMPrecond", openai_pt.score_keywords(tensors, given, file)
        if kind == "DDPMPrecond" and not any(name.startswith("model.") for name in tensors):
            tensors = {f"model.{name}": value for name, value in tensors.items()}  # published ones are of the raw net
        if kind in (None, "create_classifier"):
            kind, keywords = "create_classifier", openai_pt.classifier_keywords(tensors, given, file)
    kinds = list(denoiser.PRECONDITIONERS) if role in _DENOISERS else ["EncoderUNetModel", "create_classifier"]
    if kind not in kinds:
        raise UserError(f"a {role} network cannot be of the kind {kind!r}; use {', '.join(kinds)}")
    try:
        net = nets.build(kind, **keywords)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its keywords make no {kind} ({one_line(error)}); mend them with --set") from error
    bundles.load_state(net, tensors, file)
    return net, kind, keywords


def _write(
    bundle: "Bundle", role: str, net: "nn.Module", kind: str, keywords: dict[str, Any], time_schedule: str | None
) -> None:
    """Write the network and `bundle.json`, or leave everything as it was.

    Raises:
        UserError: the folder cannot be written.
    """
    from safetensors import SafetensorError

    from dgfast import bundle as bundles

    out = bundle.folder
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        bundles.write(bundles.with_net(bundle, role, net, kind, keywords, time_schedule))
    except BaseException as error:
        if new_folders:
            shutil.rmtree(new_folders[-1], ignore_errors=True)
        for name in (f"{role}.safetensors", f"{role}.safetensors.partial", "bundle.json.partial"):
            with suppress(OSError):
                (out / name).unlink()
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"cannot write to {out}: {error}; nothing was changed") from error
        raise


if __name__ == "__main__":
    main()
