"""python -m benchmarks.studies.drift: how far a number format leads from float32, by noise level.

Of every step of the plan it prints the relative error of one guided call at the same image, and how far the whole run
in that format has come from the one in float32 before the step, as a share of the pixel range of 2.
"""

import click
import torch
from torch import Tensor

from benchmarks.measure import PRECISIONS, precision
from benchmarks.workloads import WORKLOADS
from dgfast.devices import pick_device
from dgfast.plan import Step
from dgfast.randomness import SeedStreams
from dgfast.sampler import Sampler

_PIXEL_RANGE = 2.0


@click.command(help=__doc__)
@click.option("--workload", default="mnist32", show_default=True, type=click.Choice(list(WORKLOADS)))
@click.option("--precision", "name", default="bf16", show_default=True, type=click.Choice(list(PRECISIONS)))
@click.option("--count", default=16, show_default=True, help="Images: the seeds 0 to count - 1.")
@click.option("--device", help="default: CUDA where there is one")
def main(workload: str, name: str, count: int, device: str | None) -> None:
    at = pick_device(device)
    samplers = [_sampler(workload, each, at) for each in ("float32", name)]
    runs = [_run(sampler, each, count) for sampler, each in zip(samplers, ("float32", name), strict=True)]
    click.echo("| step | sigma | error of a call | drift of the run |\n| ---: | ---: | ---: | ---: |")
    for i, step in enumerate(samplers[0].steps):
        error = _call_error(samplers, name, i, runs[0][i])
        click.echo(f"| {i} | {step.sigma:.4g} | {error:.1e} | {_drift(runs, i):.1e} |")
    click.echo(f"| {len(samplers[0].steps)} | 0 | | {_drift(runs, -1):.1e} |")


def _sampler(workload: str, name: str, device: torch.device) -> Sampler:
    made = WORKLOADS[workload]()
    return Sampler(made.load(device, PRECISIONS[name]), made.sampling, made.guidance)


def _run(sampler: Sampler, name: str, count: int) -> list[Tensor]:
    """The state before every step, and the images."""
    states: list[Tensor] = []

    def keep(step: Step, x: Tensor, denoised: Tensor, log_ratio: Tensor) -> None:
        states.append(x.clone())

    with precision(name):
        images = sampler(range(count), on_step=keep)
    first = SeedStreams(range(count)).normal(sampler.shape, torch.float32, sampler.device)
    return [sampler.first_state(first), *states[:-1], images]


def _call_error(samplers: list[Sampler], name: str, index: int, x: Tensor) -> float:
    """Of the denoised images, relative to the largest of float32's."""
    results = []
    for sampler, each in zip(samplers, ("float32", name), strict=True):
        step = sampler.steps[index]
        labels = sampler.class_labels(sampler.draw_labels(range(len(x))), len(x)) if sampler.classes else None
        sigma = x.new_full((len(x),), step.sigma)
        with precision(each), torch.no_grad():
            results.append(sampler.job.guided("denoiser", step.predictor)(x, sigma, labels)[0])
    return float((results[1] - results[0]).abs().max() / results[0].abs().max())


def _drift(runs: list[list[Tensor]], index: int) -> float:
    """The largest difference of two states, as a share of the pixel range."""
    difference = (runs[1][index].double() - runs[0][index].double()).abs().max()
    return float(difference) / _PIXEL_RANGE


if __name__ == "__main__":
    main()
