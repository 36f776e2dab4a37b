"""Draw images.

With no option at all: 64 digits of the bundle mnist32 under discriminator guidance, into out/. What is not given on
the command line is the bundle's own default.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from dgfast import __version__
from dgfast.config import (
    DISCRETIZATIONS,
    REUSES,
    SCALINGS,
    SCHEDULES,
    SOLVERS,
    VARIANCES,
    GuidanceConfig,
    SamplingConfig,
)
from dgfast.errors import UserError
from dgfast.options import NUMBER, Command, Group, IntegerRanges, guidance_options, option

RUNTIMES = ("eager", "compiled", "onnx", "tensorrt")
PROVIDERS = ("cpu", "cuda", "tensorrt")
_SAMPLING = (
    "num_steps", "solver", "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho", "alpha",
    "S_churn", "S_min", "S_max", "S_noise", "respacing", "clip_denoised", "eta", "fixed_variance",
)  # fmt: skip


@click.command(cls=Command, help=__doc__)
@option(
    "--bundle",
    group=Group.INPUT,
    default="mnist32",
    show_default=True,
    help="Folder, or name of a bundle that comes along.",
)
@option("--seeds", group=Group.INPUT, type=IntegerRanges(), default="0-63", show_default=True, help="One image a seed.")
@option(
    "--labels",
    group=Group.INPUT,
    type=IntegerRanges(),
    help="Classes, repeated over the seeds; default: drawn from the seeds.",
)
@option(
    "--batch", group=Group.RUNTIME, type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time."
)
@option(
    "--one-step",
    group=Group.INPUT,
    is_flag=True,
    help="One forward of the bundle's generator, without solver and guidance.",
)
@option("--steps", "num_steps", group=Group.SOLVER, type=int, metavar="N", help="Noise levels above 0.")
@option("--solver", group=Group.SOLVER, type=click.Choice(SOLVERS), help="What integrates the ODE or SDE.")
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
@option("--eta", group=Group.SOLVER, type=NUMBER, metavar="eta", help="Noise of the ddim solver, from 0 to 1.")
@option(
    "--fixed-variance", group=Group.SOLVER, type=click.Choice(VARIANCES), help="Of ddpm, where the network learns none."
)
@guidance_options
@option(
    "--dg-every",
    group=Group.DISCRIMINATOR,
    type=int,
    metavar="K",
    help="Compute the discriminator's gradient at every so many guided calls only.",
)
@option("--dg-reuse", group=Group.DISCRIMINATOR, type=click.Choice(REUSES), help="What the calls between use.")
@option(
    "--dtype",
    group=Group.RUNTIME,
    type=click.Choice(["float32", "tf32", "bf16", "fp16"]),
    default="float32",
    show_default=True,
    help="Of the networks; the solver's state stays float64.",
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
@option("--vae", group=Group.INPUT, help="What decodes latents: folder or hub name; default: the bundle's own.")
@option(
    "--runtime",
    group=Group.RUNTIME,
    type=click.Choice(RUNTIMES),
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
    type=click.Choice(["reference", "triton"]),
    default="reference",
    show_default=True,
    help="Plain PyTorch, or Triton's where there are some.",
)
@option(
    "--out", group=Group.OUTPUT, type=click.Path(path_type=Path), default="out", show_default=True, help="A new folder."
)
@option(
    "--format",
    "formats",
    group=Group.OUTPUT,
    multiple=True,
    type=click.Choice(["png", "npz"]),
    default=("png", "npz"),
    show_default=True,
)
def main(bundle: str, seeds: list[int], labels: list[int] | None, batch: int, **options: Any) -> None:
    from dgfast import bundle as bundles
    from dgfast.latents import decoder
    from dgfast.networks import load
    from dgfast.one_step import OneStep
    from dgfast.ops import kernels
    from dgfast.outputs import Writer
    from dgfast.sampler import Sampler

    found = bundles.read(bundle)
    given = {name: value for name, value in options.items() if value is not None}
    one_step = options["one_step"]
    if one_step:
        _refuse_beside_one_step(given)
    sampling = _sampling(found.sampling, given)
    guidance = replace(found.guidance, **{name: given[name] for name in asdict(GuidanceConfig()) if name in given})
    device, dtype = _device_and_dtype(options["device"], options["dtype"])
    networks: Any = found.load("generator", device, dtype) if one_step else load(found, device, dtype, guidance)
    decode = decoder(found, (networks if one_step else networks.denoiser).img_channels, device, options["vae"])

    runtime, engine = _runtime(options), None
    if options["engine"]:
        engine = _engine(runtime, options["engine"], device, options["provider"])
        _require_fit(engine, found, None if one_step else (sampling, guidance))

    def make(runtime: str) -> Any:
        keywords = _keywords(runtime, device, engine, one_step, options["provider"])
        if one_step:
            return OneStep(networks, device, **keywords)
        return Sampler(networks, sampling, guidance, device, **keywords)

    sampler = make(runtime)
    classes = _labels_for(sampler, seeds, labels)
    writer = Writer(options["out"], options["formats"])
    batch = min(batch, len(seeds)) if engine is None or engine.batch is None else batch
    with kernels(options["kernels"]):
        began = time.perf_counter()
        built = False
        if runtime != "eager":
            sampler, built = _prepared(sampler, make, batch, runtime, options["compiled"] or "always")
        compile_seconds = time.perf_counter() - began if built else 0.0
        seconds = _draw(sampler, seeds, classes, batch, writer, decode, static=built)
    method = {"one_step": True} if one_step else {"sampling": asdict(sampling), "guidance": asdict(guidance)}
    job: dict[str, Any] = {"bundle": bundle, **method}
    if decode is not None:
        job["vae"] = options["vae"] or (found.vae and asdict(found.vae))
    writer.finish(
        _manifest(job, sampler, seeds, batch, options | {"runtime": runtime if built else "eager"})
        | {"compile_seconds": compile_seconds, "seconds": seconds}
    )
    click.echo(
        f"{len(seeds)} images in {seconds:.1f} s: {len(seeds) / seconds:.2f} images/s, "
        f"{_cost(sampler, one_step)} an image, "
        f"in {options['out']}/"
    )


def _refuse_beside_one_step(given: dict[str, Any]) -> None:
    """Nothing that a solver or a guidance is needed for goes with --one-step."""
    idle = {*_SAMPLING, *asdict(GuidanceConfig())} & {*given}
    names = [option.opts[0] for option in click.get_current_context().command.params if option.name in idle]
    if names:
        raise UserError(f"--one-step has no solver and no guidance: leave out {', '.join(names)}, or --one-step")


def _cost(sampler: Any, one_step: bool) -> str:
    if one_step:
        return "one generator forward"
    return f"{sampler.score_evaluations} score evaluations and {sampler.guidance_gradients} guidance gradients"


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
    for name, runtimes in (("engine", ("onnx", "tensorrt")), ("provider", ("onnx",))):
        if options[name] and runtime not in runtimes:
            raise UserError(f"--{name} goes with --runtime {' or '.join(runtimes)}, not with {runtime}")
    if runtime == "tensorrt" and not options["engine"]:
        raise UserError("--runtime tensorrt needs --engine FILE: build one with python -m dgfast.export.to_trt")
    return runtime


def _keywords(runtime: str, device: Any, engine: Any, one_step: bool, provider: str | None) -> dict[str, Any]:
    """What a sampler takes to run in this runtime."""
    if engine is not None:
        from dgfast.engines import generated_by, guided_by

        return {"engine": generated_by(engine) if one_step else guided_by(engine)}
    if runtime == "onnx":
        from dgfast.runtimes import onnx

        return {"runtime": partial(onnx.build, provider=provider)}
    if runtime == "compiled":
        from dgfast.runtimes import compiled, cuda_graph

        return {"runtime": compiled.build, "step_runtime": cuda_graph.build if device.type == "cuda" else None}
    return {}


def _engine(runtime: str, path: Path, device: Any, provider: str | None) -> Any:
    """The file, opened and tested."""
    from dgfast.runtimes import tensorrt
    from dgfast.runtimes.onnx import OnnxEngine

    engine: Any = tensorrt.load(path, device) if runtime == "tensorrt" else OnnxEngine(path, device, provider)
    engine.self_test()
    return engine


def _require_fit(engine: Any, bundle: Any, settings: tuple[SamplingConfig, GuidanceConfig] | None) -> None:
    """Raises UserError if the file does not fit the job; without settings, that is a one-step generator's."""
    from dgfast.engines import require_fit, require_generator

    if settings is None:
        require_generator(engine, bundle)
    else:
        require_fit(engine, bundle, *settings)


def _prepared(sampler: Any, make: Callable[[str], Any], batch: int, runtime: str, demand: str) -> tuple[Any, bool]:
    """The sampler, ready for batches of this size, and whether it runs in that runtime."""
    began = time.perf_counter()
    try:
        sampler.prepare(batch)
    except UserError as error:
        if demand != "try":
            raise
        click.echo(f"not compiled: {error.message}", err=True)
        return make("eager"), False
    click.echo(f"{'compiled' if runtime == 'compiled' else f'{runtime} ready'} in {time.perf_counter() - began:.1f} s")
    return sampler, True


def _device_and_dtype(device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch

    from dgfast.devices import DTYPES, keep_freed_memory, pick_device

    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    at = pick_device(device)
    if at.type == "cpu":
        keep_freed_memory()
    return at, DTYPES[dtype]


def _labels_for(sampler: Any, seeds: Sequence[int], labels: list[int] | None) -> list[int] | None:
    """The label of each seed, checked; None leaves them to the seeds."""
    if labels is None:
        return None
    repeated = [labels[k % len(labels)] for k in range(len(seeds))]
    sampler.class_labels(repeated, len(seeds))
    return repeated


def _draw(
    sampler: Any, seeds: list[int], labels: list[int] | None, batch: int, writer: Any, decode: Any, static: bool
) -> float:
    """Sample all seeds, batch by batch, into the writer; the seconds it took."""
    from tqdm import tqdm

    from dgfast.batches import draw

    began = time.perf_counter()
    steps = math.ceil(len(seeds) / batch) * len(sampler.steps)
    with tqdm(total=steps, unit="step", desc="sampling", dynamic_ncols=True) as bar:

        def smaller(batch: int) -> None:
            bar.write(f"out of memory: going on with batches of {batch} images")

        draw(
            sampler, seeds, labels, batch, writer.add, decode=decode, static=static,
            on_step=lambda step, x: bar.update(), on_smaller_batch=smaller,
        )  # fmt: skip
    return time.perf_counter() - began


def _manifest(job: dict[str, Any], sampler: Any, seeds: list[int], batch: int, options: dict[str, Any]) -> Any:
    import platform

    import torch

    return {
        "job": {
            **job,
            "dtype": options["dtype"],
            "compile": options["runtime"] == "compiled",
            "runtime": options["runtime"],
            "kernels": options["kernels"],
            "batch": batch,
        },
        "versions": {"dgfast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(sampler.device),
        "seeds": seeds,
        "score_evaluations": sampler.score_evaluations,
        "guidance_gradients": sampler.guidance_gradients,
        "guided_calls": sum(bool(step.predictor) + bool(step.corrector) for step in sampler.steps),
    }


if __name__ == "__main__":
    main()
