"""python -m dgfast.sample: draw images.

With no option at all: 64 digits of the bundle mnist32 under discriminator guidance, into out/. What is not given on
the command line is the bundle's own default.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from dgfast import __version__
from dgfast.config import DISCRETIZATIONS, REUSES, SCALINGS, SCHEDULES, SOLVERS, GuidanceConfig
from dgfast.errors import UserError

_SAMPLING = (
    "num_steps", "solver", "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho", "alpha",
    "S_churn", "S_min", "S_max", "S_noise",
)  # fmt: skip


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


_NUMBER = FiniteFloat()


@click.command(help=__doc__)
@click.option("--bundle", default="mnist32", show_default=True, help="Folder, or name of a bundle that comes along.")
@click.option("--seeds", type=IntegerRanges(), default="0-63", show_default=True, help="One image a seed.")
@click.option("--labels", type=IntegerRanges(), help="Classes, repeated over the seeds; default: drawn from the seeds.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option("--one-step", is_flag=True, help="One forward of the bundle's generator, without solver and guidance.")
@click.option("--steps", "num_steps", type=int, help="Noise levels above 0.")
@click.option("--solver", type=click.Choice(SOLVERS))
@click.option("--grid", "discretization", type=click.Choice(DISCRETIZATIONS), help="How noise levels are spaced.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="sigma(t), the solver's time.")
@click.option("--scaling", type=click.Choice(SCALINGS), help="s(t), the solver's signal scale.")
@click.option("--sigma-min", type=_NUMBER, help="Smallest noise level above 0.")
@click.option("--sigma-max", type=_NUMBER, help="Largest noise level.")
@click.option("--rho", type=_NUMBER, help="Exponent of the edm grid.")
@click.option("--alpha", type=_NUMBER, help="Heun's second point, as a share of the step.")
@click.option("--s-churn", "S_churn", type=_NUMBER, help="Noise added anew over the run.")
@click.option("--s-min", "S_min", type=_NUMBER, help="Churn above this noise level only.")
@click.option("--s-max", "S_max", type=float, help="Churn below this noise level only.")
@click.option("--s-noise", "S_noise", type=_NUMBER, help="Standard deviation of the added noise.")
@click.option("--dg-weight", type=_NUMBER, help="Discriminator guidance; 0 turns it off.")
@click.option("--dg-weight-2nd", type=_NUMBER, help="The same at the solver's second point.")
@click.option("--dg-window", type=FloatPair(), help="VP times between which it acts.")
@click.option("--dg-every", type=int, help="Compute its gradient at every so many guided calls only.")
@click.option("--dg-reuse", type=click.Choice(REUSES), help="What the calls between use.")
@click.option("--boosting", is_flag=True, default=None, help="DG's boosting, for conditional nets.")
@click.option(
    "--published-window", is_flag=True, default=None, help="Judge the window by the batch, as DG's code does."
)
@click.option("--classifier-scale", type=_NUMBER, help="Classifier guidance; 0 turns it off.")
@click.option("--cfg-scale", type=_NUMBER, help="Classifier-free guidance; 1 turns it off.")
@click.option("--guidance-interval", type=FloatPair(), help="Noise levels sigma between which --cfg-scale acts.")
@click.option("--autoguidance", type=_NUMBER, help="Guidance by a worse net; 1 turns it off.")
@click.option("--dtype", type=click.Choice(["float32", "tf32", "bf16", "fp16"]), default="float32", show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: what is there.")
@click.option(
    "--compile",
    "compiled",
    type=click.Choice(["always", "try"]),
    is_flag=False,
    flag_value="always",
    help="Compile the guided denoiser before sampling; --compile=try samples without where that can't be done.",
)
@click.option("--kernels", type=click.Choice(["reference", "triton"]), default="reference", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="A new folder.")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["png", "npz"]), default=("png", "npz"), show_default=True
)
def main(bundle: str, seeds: list[int], labels: list[int] | None, batch: int, **options: Any) -> None:
    from dgfast import bundle as bundles
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
    sampling = replace(found.sampling, **{name: given[name] for name in _SAMPLING if name in given})
    guidance = replace(found.guidance, **{name: given[name] for name in asdict(GuidanceConfig()) if name in given})
    device, dtype = _device_and_dtype(options["device"], options["dtype"])
    networks: Any = found.load("generator", device, dtype) if one_step else load(found, device, dtype, guidance)

    def make(compiled: bool) -> Any:
        runtimes = _runtimes(device) if compiled else {}
        return (
            OneStep(networks, device, **runtimes)
            if one_step
            else Sampler(networks, sampling, guidance, device, **runtimes)
        )

    sampler = make(compiled=options["compiled"] is not None)
    classes = _labels_for(sampler, seeds, labels)
    writer = Writer(options["out"], options["formats"])
    batch = min(batch, len(seeds))
    with kernels(options["kernels"]):
        began = time.perf_counter()
        compiled = False
        if options["compiled"]:
            sampler, compiled = _compiled(sampler, make, batch, options["compiled"])
        compile_seconds = time.perf_counter() - began if compiled else 0.0
        seconds = _draw(sampler, seeds, classes, batch, writer, static=compiled)
    method = {"one_step": True} if one_step else {"sampling": asdict(sampling), "guidance": asdict(guidance)}
    job = {"bundle": bundle, **method}
    writer.finish(
        _manifest(job, sampler, seeds, batch, options | {"compiled": compiled})
        | {"compile_seconds": compile_seconds, "seconds": seconds}
    )
    click.echo(
        f"{len(seeds)} images in {seconds:.1f} s: {len(seeds) / seconds:.2f} images/s, "
        f"{_cost(sampler, one_step)} an image, "
        f"in {options['out']}/"
    )


def _refuse_beside_one_step(given: dict[str, Any]) -> None:
    """No option of the solver or of a guidance beside --one-step, which has neither."""
    solver_or_guidance = {*_SAMPLING, *asdict(GuidanceConfig())}
    idle = [p.opts[0] for p in click.get_current_context().command.params if p.name in solver_or_guidance & {*given}]
    if idle:
        raise UserError(f"--one-step runs neither solver nor guidance: leave out {', '.join(idle)}, or --one-step")


def _cost(sampler: Any, one_step: bool) -> str:
    if one_step:
        return "one generator forward"
    return f"{sampler.score_evaluations} score evaluations and {sampler.guidance_gradients} guidance gradients"


def _runtimes(device: Any) -> dict[str, Any]:
    """The sampler's runtimes when it is to be compiled."""
    from dgfast.runtimes import compiled, cuda_graph

    return {"runtime": compiled.build, "step_runtime": cuda_graph.build if device.type == "cuda" else None}


def _compiled(sampler: Any, make: Callable[[bool], Any], batch: int, demand: str) -> tuple[Any, bool]:
    """The sampler, ready for batches of this size, and whether it is compiled."""
    began = time.perf_counter()
    try:
        sampler.prepare(batch)
    except UserError as error:
        if demand != "try":
            raise
        click.echo(f"not compiled: {error.message}", err=True)
        return make(False), False
    click.echo(f"compiled in {time.perf_counter() - began:.1f} s")
    return sampler, True


def _device_and_dtype(device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch

    from dgfast.devices import DTYPES, pick_device

    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return pick_device(device), DTYPES[dtype]


def _labels_for(sampler: Any, seeds: Sequence[int], labels: list[int] | None) -> list[int] | None:
    """The label of each seed, checked; None leaves them to the seeds."""
    if labels is None:
        return None
    repeated = [labels[k % len(labels)] for k in range(len(seeds))]
    sampler.class_labels(repeated, len(seeds))
    return repeated


def _draw(sampler: Any, seeds: list[int], labels: list[int] | None, batch: int, writer: Any, static: bool) -> float:
    """Sample all seeds, batch by batch, into the writer; the seconds it took."""
    from tqdm import tqdm

    from dgfast.batches import draw

    began = time.perf_counter()
    steps = math.ceil(len(seeds) / batch) * len(sampler.steps)
    with tqdm(total=steps, unit="step", desc="sampling", dynamic_ncols=True) as bar:

        def smaller(batch: int) -> None:
            bar.write(f"out of memory: going on with batches of {batch} images")

        draw(
            sampler, seeds, labels, batch, writer.add, static=static,
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
            "compile": options["compiled"],
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
