"""Draw images.

With no option at all: 64 digits of the bundle mnist32 under discriminator guidance, into out/. What is not given on
the command line is the bundle's own default.
"""

import platform
import shlex
import sys
import time
from dataclasses import asdict
from typing import Any

import click

from dgfast import __version__
from dgfast.config import GRID_IMAGES, KEPT, NOISES, PRODUCTS
from dgfast.errors import UserError
from dgfast.execution import PROVIDERS, Execution
from dgfast.files import sha256
from dgfast.job_options import GuidedCommand
from dgfast.manifest import recorded
from dgfast.option_types import PATH, Duration, IntegerRanges
from dgfast.options import BUNDLE, Group, names_as_typed, option
from dgfast.ranges import Ranges
from dgfast.runtimes import PRECISIONS, RUNTIMES, Runtime
from dgfast.settings import Settings, settings_of
from dgfast.stopping import interruptible


@click.command(cls=GuidedCommand, sampling=True, help=__doc__)
@BUNDLE
@option(
    "--seeds", group=Group.INPUT, default="0-63", help="One image a seed; or @FILE of them.",
    type=IntegerRanges(2**32, "seeds go up to 4294967295; EDM's generator would take it for another one"),
)  # fmt: skip
@option(
    "--labels", group=Group.INPUT, type=IntegerRanges(),
    help="Classes, repeated over the seeds, or @FILE of them; default: drawn from the seeds.",
)  # fmt: skip
@option(
    "--noise", group=Group.INPUT, type=click.Choice(NOISES), default="cpu",
    help="Whose numbers a seed stands for: torch's on the CPU, or on CUDA, as in NVIDIA's published images; anywhere.",
)  # fmt: skip
@option("--batch", group=Group.RUNTIME, type=click.IntRange(min=1), default=64, help="Images at a time.")
@option(
    "--preset", group=Group.INPUT, metavar="NAME",
    help="EDM2's sampling and guidance by its own names, such as edm2-img512-s-autog-fid; other options go over it.",
)  # fmt: skip
@option(
    "--one-step", group=Group.INPUT, is_flag=True,
    help="One forward of the bundle's generator, without solver and guidance.",
)  # fmt: skip
@option("--dtype", group=Group.RUNTIME, type=click.Choice(PRECISIONS), default="float32", help="Of the networks.")
@option("--device", group=Group.RUNTIME, help="cpu, cuda, cuda:1, ...; default: what is there.")
@option(
    "--compile", "compiled", group=Group.RUNTIME, type=click.Choice(["always", "try"]), is_flag=False,
    flag_value="always",
    help="Compile the guided denoiser before sampling; --compile=try samples without where that can't be done.",
)  # fmt: skip
@option(
    "--vae", group=Group.INPUT,
    help="What decodes latents: folder or hub name; none if they are pixels; default: the bundle's own.",
)  # fmt: skip
@option(
    "--runtime", group=Group.RUNTIME, type=click.Choice(list(RUNTIMES)),
    help="What executes the guided denoiser; --compile is short for --runtime compiled.  [default: eager]",
)  # fmt: skip
@option(
    "--engine", group=Group.INPUT, type=PATH,
    help="What `python -m dgfast.export.to_onnx` or to_trt wrote; default: export to ONNX.",
)  # fmt: skip
@option("--provider", group=Group.RUNTIME, type=click.Choice(PROVIDERS), help="ONNX Runtime's; default: the device's.")
@option(
    "--kernels", group=Group.RUNTIME, type=click.Choice(["auto", "reference", "triton"]), default="auto",
    help="Of normalisation and attention: PyTorch's or Triton's; on CUDA auto takes those measured to be faster.",
)  # fmt: skip
@option(
    "--out", group=Group.OUTPUT, type=PATH, default="out", help="A new folder, or that of the same job, which goes on."
)
@option(
    "--format", "formats", group=Group.OUTPUT, multiple=True, type=click.Choice([*KEPT, *PRODUCTS]),
    default=("npz", "grid"),
    help="npz: shards of a batch, uint8, with seeds and labels. png: one file an image, 000000/000123.png by seed. "
    "adm: one arr_0 npz for the ADM suite. latents: shards of what the network drew, undecoded. grid: beside another, "
    f"one PNG of the first {GRID_IMAGES}. To be given several times.",
)  # fmt: skip
@option(
    "--overwrite", group=Group.OUTPUT, is_flag=True, help="Remove the job that --out holds, whichever it is, first."
)
@option(
    "--time-limit", group=Group.OUTPUT, type=Duration(),
    help="Stop when a batch more would take longer than this: 90s, 30m, 2.5h. The same command goes on.",
)  # fmt: skip
@option("--dry-run", group=Group.OUTPUT, is_flag=True, help="Say what is to draw, its time and its disk, and end.")
def main(**options: Any) -> None:
    with interruptible():
        began = time.monotonic()
        from dgfast.devices import precision

        with precision(options["dtype"]):
            _main(options, began)


def _main(options: dict[str, Any], began: float) -> None:
    from dgfast import bundle as bundles
    from dgfast.devices import DTYPES, own_device
    from dgfast.drawing import Drawing, run
    from dgfast.estimate import estimate
    from dgfast.job_folder import JobFolder
    from dgfast.ops import require_kernels
    from dgfast.team import Team

    bundle = bundles.read(options["bundle"])
    formats = _formats(options["formats"], options["seeds"])
    team = Team.join()
    device = own_device(options["device"], team.local_rank)
    settings = settings_of(bundle, {name: value for name, value in options.items() if value is not None})
    require_kernels(options["kernels"], device.type)
    networks = _networks(bundle, settings, device, DTYPES[options["dtype"]])
    fetcher = _fetcher(bundle, networks, device, options["vae"], formats)
    execution = Execution.asked(options, device)
    if execution.engine is not None:
        execution.require_fit(bundle, settings)
        options["dtype"] = execution.dtype(options["dtype"])

    def make(runtime: str) -> Any:
        return _sampler(networks, settings, device, execution.runtime(runtime), options["noise"])

    _check_labels(make("eager"), options["labels"])
    drawing = Drawing(
        folder=JobFolder(
            options["out"], _job(bundle, settings, options, execution.name), _chunks(options, execution.engine),
            formats, team.rank, team.size, names_as_typed(),
        ),
        team=team, make=make, runtime=execution.name, fetcher=fetcher, kernels=options["kernels"],
        facts=_facts(device, team), may_fall_back=options["compiled"] == "try", time_limit=options["time_limit"],
        began=began,
    )  # fmt: skip
    if options["dry_run"]:
        drawing.folder.look(options["overwrite"])
        click.echo(estimate(drawing))
    else:
        run(drawing, options["overwrite"])


def _formats(names: tuple[str, ...], seeds: Ranges) -> list[str]:
    """The formats, each once.

    Raises:
        UserError: formats that would lose images without a word.
    """
    formats = list(dict.fromkeys(names))
    if "grid" in formats and not {"npz", "png", "adm"} & {*formats}:
        raise UserError("--format grid shows the first images and keeps none: give npz, png or adm beside it")
    if "png" in formats and seeds.repeated is not None:
        raise UserError(f"--format png has one file a seed, and seed {seeds.repeated} stands twice in --seeds; use npz")
    return formats


def _networks(bundle: Any, settings: Settings | None, device: Any, dtype: Any) -> Any:
    """The networks that the job needs; of a one-step job its generator."""
    from dgfast.networks import load

    return bundle.load("generator", device, dtype) if settings is None else load(bundle, device, dtype, settings[1])


def _sampler(networks: Any, settings: Settings | None, device: Any, runtime: Runtime, noise: str) -> Any:
    from dgfast.one_step import OneStep
    from dgfast.sampler import Sampler

    if settings is None:
        return OneStep(networks, device, runtime, noise)
    return Sampler(networks, *settings, device, runtime, noise=noise)


def _fetcher(bundle: Any, networks: Any, device: Any, vae: str | None, formats: list[str]) -> Any:
    """What makes images of latents, and arrays of both, as far as the formats keep them.

    Raises:
        UserError: latents of a bundle that makes images, or no VAE for those of another.
    """
    from dgfast.latents import IMAGE_CHANNELS, decoder
    from dgfast.outputs import Fetcher, require_pictures

    channels = getattr(networks, "denoiser", networks).img_channels
    if "latents" in formats and not (vae or bundle.vae) and channels in IMAGE_CHANNELS:
        raise UserError(f"--format latents: bundle {bundle.name} makes images, there are no latents; use npz or png")
    images = formats != ["latents"]
    decode = decoder(bundle, channels, device, vae) if images else None
    require_pictures(formats, channels if decode is None else 3)
    return Fetcher(decode, images, "latents" in formats)


def _check_labels(sampler: Any, labels: Ranges | None) -> None:
    """Raises UserError for a class that the network does not know."""
    if labels is not None:
        sampler.class_labels([labels.largest], 1)


def _chunks(options: dict[str, Any], engine: Any) -> Any:
    from dgfast.chunks import Chunks

    seeds, batch = options["seeds"], options["batch"]
    fixed = engine is not None and engine.batch is not None
    return Chunks(seeds, options["labels"], batch if fixed else min(batch, len(seeds)))


def _job(bundle: Any, settings: Settings | None, options: dict[str, Any], runtime: str) -> dict[str, Any]:
    """Everything that decides on the images, as the manifest has it."""
    from dgfast.devices import arithmetic
    from dgfast.networks import roles

    method: dict[str, Any] = {"one_step": True}
    if settings is not None:
        method = {"sampling": asdict(settings[0]), "guidance": recorded(settings[1])}
    decoding = options["vae"] or (bundle.vae and bundle.vae.described())
    return {
        "bundle": bundle.name,
        "weights": bundle.fingerprint(["generator"] if settings is None else roles(bundle, settings[1])),
        **method,
        "seeds": str(options["seeds"]),
        "labels": options["labels"] and str(options["labels"]),
        **({"vae": decoding} if decoding else {}),
        **({"engine": sha256(options["engine"])} if options["engine"] else {}),
        **({"noise": options["noise"]} if options["noise"] != "cpu" else {}),
        "dtype": options["dtype"],
        "arithmetic": arithmetic(),
        "runtime": runtime,
        "kernels": options["kernels"],
        "batch": options["batch"],
    }


def _facts(device: Any, team: Any) -> dict[str, Any]:
    """What the manifest tells of a run beside its job."""
    import torch

    from dgfast.devices import describe

    versions = {"dgfast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "command": shlex.join(sys.orig_argv), "device": describe(device), "processes": team.size, "versions": versions
    }  # fmt: skip


if __name__ == "__main__":
    main()
