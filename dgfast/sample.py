"""Draw images.

With no option at all: 64 digits of the bundle mnist32 under discriminator guidance, into out/. What is not given on
the command line is the bundle's own default.
"""

import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from dgfast import __version__
from dgfast.config import (
    DISCRETIZATIONS,
    GRID_IMAGES,
    KEPT,
    NOISES,
    PRODUCTS,
    SCALINGS,
    SCHEDULES,
    STATE_DTYPES,
    VARIANCES,
    GuidanceConfig,
    SamplingConfig,
)
from dgfast.errors import UserError
from dgfast.files import sha256
from dgfast.manifest import recorded
from dgfast.options import NUMBER, Duration, Group, GuidedCommand, IntegerRanges, option
from dgfast.ranges import Ranges
from dgfast.runtimes import PRECISIONS, RUNTIMES, Runtime
from dgfast.stopping import interruptible

PROVIDERS = ("cpu", "cuda", "tensorrt")
_SAMPLING = (
    "num_steps", "solver", "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho", "alpha",
    "S_churn", "S_min", "S_max", "S_noise", "respacing", "clip_denoised", "eta", "fixed_variance",
    "state_dtype",
    "diffusion", "diffusion_norm", "last_step", "last_size",
)  # fmt: skip


@click.command(cls=GuidedCommand, help=__doc__)
@option(
    "--bundle",
    group=Group.INPUT,
    default="mnist32",
    show_default=True,
    help="Folder, or name of a bundle that comes along.",
)
@option(
    "--seeds",
    group=Group.INPUT,
    type=IntegerRanges(2**32, "seeds go up to 4294967295; EDM's generator would take it for another one"),
    default="0-63",
    show_default=True,
    help="One image a seed; or @FILE of them.",
)
@option(
    "--labels",
    group=Group.INPUT,
    type=IntegerRanges(),
    help="Classes, repeated over the seeds, or @FILE of them; default: drawn from the seeds.",
)
@option(
    "--noise",
    group=Group.INPUT,
    type=click.Choice(NOISES),
    default="cpu",
    show_default=True,
    help="Whose numbers a seed stands for: torch's on the CPU, or on CUDA, as in NVIDIA's published images; anywhere.",
)
@option(
    "--batch", group=Group.RUNTIME, type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time."
)
@option(
    "--preset",
    group=Group.INPUT,
    metavar="NAME",
    help="EDM2's sampling and guidance by its own names, such as edm2-img512-s-autog-fid; other options go over it.",
)
@option(
    "--one-step",
    group=Group.INPUT,
    is_flag=True,
    help="One forward of the bundle's generator, without solver and guidance.",
)
@option("--steps", "num_steps", group=Group.SOLVER, type=int, metavar="N", help="Steps: noise levels above 0.")
@option(
    "--grid",
    "discretization",
    group=Group.SOLVER,
    type=click.Choice(DISCRETIZATIONS),
    help="How noise levels are spaced.",
)
@option("--schedule", group=Group.SOLVER, type=click.Choice(SCHEDULES), help="sigma(t), the solver's time.")
@option("--scaling", group=Group.SOLVER, type=click.Choice(SCALINGS), help="s(t), the solver's signal scale.")
@option(
    "--sigma-min",
    group=Group.SOLVER,
    type=NUMBER,
    metavar="sigma",
    help="Smallest noise level above 0; default: the grid's own.",
)
@option(
    "--sigma-max",
    group=Group.SOLVER,
    type=NUMBER,
    metavar="sigma",
    help="Largest noise level; default: the grid's own.",
)
@option("--rho", group=Group.SOLVER, type=NUMBER, metavar="rho", help="Exponent of the edm grid.")
@option(
    "--alpha", group=Group.SOLVER, type=NUMBER, metavar="alpha", help="Heun's second point, as a share of the step."
)
@option(
    "--s-churn", "S_churn", group=Group.SOLVER, type=NUMBER, metavar="S_churn", help="Noise added anew over the run."
)
@option("--s-min", "S_min", group=Group.SOLVER, type=NUMBER, metavar="S_min", help="Churn above this noise level only.")
@option("--s-max", "S_max", group=Group.SOLVER, type=float, metavar="S_max", help="Churn below this noise level only.")
@option(
    "--s-noise",
    "S_noise",
    group=Group.SOLVER,
    type=NUMBER,
    metavar="S_noise",
    help="Standard deviation of the added noise.",
)
@option("--respacing", group=Group.SOLVER, help="Timesteps of a discrete-time network to keep: 250, ddim25, 10,10,5.")
@option(
    "--fixed-variance", group=Group.SOLVER, type=click.Choice(VARIANCES), help="Of ddpm, where the network learns none."
)
@option("--last-size", group=Group.SOLVER, type=NUMBER, metavar="t", help="Size of --last-step in the path's time.")
@option(
    "--dtype",
    group=Group.RUNTIME,
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="Of the networks.",
)
@option(
    "--state-dtype",
    group=Group.SOLVER,
    type=click.Choice(STATE_DTYPES),
    help="Of the solver's state, its noise levels and its noise.",
)
@option("--device", group=Group.RUNTIME, help="cpu, cuda, cuda:1, ...; default: what is there.")
@option(
    "--compile",
    "compiled",
    group=Group.RUNTIME,
    type=click.Choice(["always", "try"]),
    is_flag=False,
    flag_value="always",
    help="Compile the guided denoiser before sampling; --compile=try samples without where that can't be done.",
)
@option(
    "--vae",
    group=Group.INPUT,
    help="What decodes latents: folder or hub name; none if they are pixels; default: the bundle's own.",
)
@option(
    "--runtime",
    group=Group.RUNTIME,
    type=click.Choice(list(RUNTIMES)),
    help="What executes the guided denoiser; --compile is short for --runtime compiled.  [default: eager]",
)
@option(
    "--engine",
    group=Group.INPUT,
    type=click.Path(path_type=Path),
    help="What `python -m dgfast.export.to_onnx` or to_trt wrote; default: export to ONNX.",
)
@option("--provider", group=Group.RUNTIME, type=click.Choice(PROVIDERS), help="ONNX Runtime's; default: the device's.")
@option(
    "--kernels",
    group=Group.RUNTIME,
    type=click.Choice(["auto", "reference", "triton"]),
    default="auto",
    show_default=True,
    help="Of group normalisation: plain PyTorch's, or Triton's; auto takes Triton's on CUDA, where it can run.",
)
@option(
    "--out",
    group=Group.OUTPUT,
    type=click.Path(path_type=Path),
    default="out",
    show_default=True,
    help="A new folder, or that of the same job, which goes on.",
)
@option(
    "--format",
    "formats",
    group=Group.OUTPUT,
    multiple=True,
    type=click.Choice([*KEPT, *PRODUCTS]),
    default=("npz", "grid"),
    show_default=True,
    help="npz: shards of a batch, uint8, with seeds and labels. png: one file an image, 000000/000123.png by seed. "
    "adm: one arr_0 npz for the ADM suite. latents: shards of what the network drew, undecoded. grid: beside another, "
    f"one PNG of the first {GRID_IMAGES}. To be given several times.",
)
@option(
    "--overwrite", group=Group.OUTPUT, is_flag=True, help="Remove the job that --out holds, whichever it is, first."
)
@option(
    "--time-limit",
    group=Group.OUTPUT,
    type=Duration(),
    help="Stop when a batch more would take longer than this: 90s, 30m, 2.5h. The same command goes on.",
)
@option("--dry-run", group=Group.OUTPUT, is_flag=True, help="Say what is to draw, its time and its disk, and end.")
def main(**options: Any) -> None:
    with interruptible():
        began = time.monotonic()
        from dgfast.devices import precision

        with precision(options["dtype"]):
            _main(options, began)


def _main(options: dict[str, Any], began: float) -> None:
    from dgfast import bundle as bundles
    from dgfast.drawing import Drawing, run
    from dgfast.estimate import estimate
    from dgfast.job_folder import JobFolder
    from dgfast.ops import require_kernels
    from dgfast.team import Team

    bundle = bundles.read(options["bundle"])
    set_options = {name: value for name, value in options.items() if value is not None}
    formats = _formats(options["formats"], options["seeds"])
    team = Team.join()
    device, dtype = _device_and_dtype(options["device"], options["dtype"], team.local_rank)
    settings = _settings(bundle, set_options)
    require_kernels(options["kernels"], device.type)
    networks = _networks(bundle, settings, device, dtype)
    fetcher = _fetcher(bundle, networks, device, options["vae"], formats)
    runtime, engine = _runtime(options), None
    if options["engine"]:
        engine = _engine(runtime, options["engine"], device, options["provider"])
        _require_fit(engine, bundle, settings)
        options["dtype"] = _dtype_of(engine, options["dtype"])

    def make(runtime: str) -> Any:
        return _sampler(networks, settings, device, _executing(runtime, engine, options["provider"]), options["noise"])

    _check_labels(make("eager"), options["labels"])
    chunks = _chunks(options, engine)
    drawing = Drawing(
        folder=JobFolder(
            options["out"], _job(bundle, settings, options, runtime), chunks, formats, team.rank, team.size
        ),
        team=team, make=make, runtime=runtime, fetcher=fetcher, kernels=options["kernels"], facts=_facts(device, team),
        may_fall_back=options["compiled"] == "try", time_limit=options["time_limit"], began=began,
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


def _settings(bundle: Any, given: dict[str, Any]) -> tuple[SamplingConfig, GuidanceConfig] | None:
    """Sampling and guidance: the preset's or the bundle's, under what the command line gives; None for a generator.

    Raises:
        UserError: options that nothing takes, or that contradict one another.
    """
    if given["one_step"]:
        idle = {*_SAMPLING, *asdict(GuidanceConfig())} & {*given}
        context = click.get_current_context()
        idle |= {"preset"} & {*given}
        names = [option.opts[0] for option in context.command.get_params(context) if option.name in idle]
        if names:
            raise UserError(f"--one-step has no solver and no guidance: leave out {', '.join(names)}, or --one-step")
        return None
    sampling, guidance = _preset(bundle, given["preset"]) if "preset" in given else (bundle.sampling, bundle.guidance)
    guidance = replace(guidance, **{name: given[name] for name in asdict(GuidanceConfig()) if name in given})
    return _sampling(sampling, given), guidance


def _preset(bundle: Any, name: str) -> tuple[SamplingConfig, GuidanceConfig]:
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


def _sampling(bundled: SamplingConfig, given: dict[str, Any]) -> SamplingConfig:
    """The bundle's sampling with what the command line gives, which names one grid alone."""
    changes = {name: given[name] for name in _SAMPLING if name in given}
    grid = [name for name in ("discretization", "sigma_min", "sigma_max", "rho") if name in given]
    if "respacing" in given and (grid or "num_steps" in given):
        raise UserError("--respacing is the whole grid: leave out --steps, --grid, --sigma-min, --sigma-max and --rho")
    if bundled.respacing is not None and "respacing" not in given:
        if grid:
            changes["respacing"] = None
        elif "num_steps" in given:
            changes["respacing"] = str(given["num_steps"])
    return replace(bundled, **changes)


def _runtime(options: dict[str, Any]) -> str:
    """The runtime that the options ask for.

    Raises:
        UserError: options that contradict one another.
    """
    short = "compiled" if options["compiled"] else None
    runtime = options["runtime"] or short or "eager"
    if short not in (None, runtime):
        raise UserError(f"--compile and --runtime {runtime} contradict each other; give one of them")
    for name, runtimes in (("engine", [r.name for r in RUNTIMES.values() if r.open]), ("provider", ["onnx"])):
        if options[name] and runtime not in runtimes:
            raise UserError(f"--{name} goes with --runtime {' or '.join(runtimes)}, not with {runtime}")
    if runtime == "tensorrt" and not options["engine"]:
        raise UserError("--runtime tensorrt needs --engine FILE: build one with python -m dgfast.export.to_trt")
    return runtime


def _executing(name: str, engine: Any, provider: str | None) -> Runtime:
    """The runtime of that name; with an engine file, what executes that file."""
    if engine is not None and name != "eager":
        from dgfast.engines import runtime_of

        return runtime_of(engine)
    if provider is None:
        return RUNTIMES[name]
    from dgfast.runtimes.onnx.build import build

    return replace(RUNTIMES[name], build=partial(build, provider=provider))


def _engine(runtime: str, path: Path, device: Any, provider: str | None) -> Any:
    """The file, opened and tested."""
    opened = RUNTIMES[runtime].open
    assert opened is not None, "the options were checked"
    engine = opened(path, device, provider) if provider else opened(path, device)
    engine.self_test()
    return engine


def _require_fit(engine: Any, bundle: Any, settings: tuple[SamplingConfig, GuidanceConfig] | None) -> None:
    """Raises UserError if the file does not fit the job; without settings, that is a one-step generator's."""
    from dgfast.engines import require_fit, require_generator

    if settings is None:
        require_generator(engine, bundle)
    else:
        require_fit(engine, bundle, *settings)


def _dtype_of(engine: Any, asked: str) -> str:
    """The type that the file computes in, which decides on the images whatever --dtype is by default.

    Raises:
        UserError: another was asked for.
    """
    said = str(engine.metadata.get("dtype", asked))
    source = click.get_current_context().get_parameter_source("dtype")
    if said != asked and source is not click.core.ParameterSource.DEFAULT:
        raise UserError(f"--dtype {asked}: {engine.path} computes in {said}; leave --dtype out, or export another file")
    return said


def _device_and_dtype(name: str | None, dtype: str, local_rank: int) -> tuple[Any, Any]:
    """The device of this process, and the type of the weights."""
    import torch

    from dgfast.devices import DTYPES, keep_freed_memory, pick_device

    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    if device.type == "cpu":
        keep_freed_memory()
    return device, DTYPES[dtype]


def _networks(bundle: Any, settings: tuple[SamplingConfig, GuidanceConfig] | None, device: Any, dtype: Any) -> Any:
    """The networks that the job needs; of a one-step job its generator."""
    from dgfast.networks import load

    return bundle.load("generator", device, dtype) if settings is None else load(bundle, device, dtype, settings[1])


def _sampler(
    networks: Any, settings: tuple[SamplingConfig, GuidanceConfig] | None, device: Any, runtime: Runtime, noise: str
) -> Any:
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
    from dgfast.job_folder import Chunks

    seeds, batch = options["seeds"], options["batch"]
    fixed = engine is not None and engine.batch is not None
    return Chunks(seeds, options["labels"], batch if fixed else min(batch, len(seeds)))


def _job(
    bundle: Any, settings: tuple[SamplingConfig, GuidanceConfig] | None, options: dict[str, Any], runtime: str
) -> dict[str, Any]:
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
