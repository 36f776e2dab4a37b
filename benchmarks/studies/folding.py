"""python -m benchmarks.studies.folding: what it gains that EDM2's weights are normalised once, and what guidance costs.

Calls of a network of EDM2 with random weights: normalising every weight anew, as its code does, and folded; folded and
guided by a network of half the channels; the same compiled. All take turns, so that a busy machine slows all alike;
times are medians.
"""

import copy
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import click
import torch

from benchmarks.measure import Call, check, relative_error, seconds
from benchmarks.tables import table
from benchmarks.workloads import fill_
from dgfast import GuidanceConfig, Networks, SamplingConfig, nets
from dgfast.devices import keep_freed_memory
from dgfast.job import Job
from dgfast.presets import SAMPLING
from dgfast.runtimes import RUNTIMES
from dgfast.weights import placed

_SIGMA, _WEIGHT = 1.0, 2.0


@click.command(help=__doc__)
@click.option("--channels", default=64, show_default=True, type=click.IntRange(min=2))
@click.option("--resolution", default=32, show_default=True, type=click.IntRange(min=8))
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1))
@torch.no_grad()
def main(channels: int, resolution: int, batch: int, rounds: int) -> None:
    keep_freed_memory()
    unfolded, worse = (_net(width, resolution) for width in (channels, channels // 2))
    folded, worse = (placed(copy.deepcopy(net), "cpu", torch.float32) for net in (unfolded, worse))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, resolution, resolution, generator=generator).double() * _SIGMA
    labels = torch.eye(unfolded.label_dim)[:1].expand(batch, -1)
    arguments = x, torch.full((batch,), _SIGMA, dtype=torch.float64), labels

    def call(net: Any, runtime: str, guided: bool) -> Call:
        networks = Networks(net, reference=worse)
        job = Job(networks, SamplingConfig(**SAMPLING), GuidanceConfig(autoguidance=_WEIGHT if guided else 1.0))
        function = job.guided("denoiser", job.steps[0].predictor)
        return partial(RUNTIMES[runtime].build(function, arguments), *arguments)

    calls: dict[str, Call] = {
        "eager, weights normalised in each call": call(unfolded, "eager", guided=False),
        "eager, folded": call(folded, "eager", guided=False),
        "eager, folded, guided": call(folded, "eager", guided=True),
        "compiled": call(folded, "compiled", guided=False),
        "compiled, guided": call(folded, "compiled", guided=True),
    }
    truth = {"guided": calls["eager, folded, guided"](), "": calls["eager, folded"]()}
    for name, one in calls.items():
        error = relative_error(one(), truth["guided" if name.endswith("guided") else ""])
        check(name, "eager, folded", error, RUNTIMES["compiled"].tolerance)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, one in calls.items():
            times[name].append(seconds(one))
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    table(["call", "time", "of the first"], [_row(name, median, first) for name, median in medians.items()])


def _row(name: str, median: float, first: float) -> Sequence[str]:
    return [name, f"{1e3 * median:.1f} ms", f"{median / first:.2f} x"]


def _net(channels: int, resolution: int) -> Any:
    """A network of EDM2's depth, as its checkpoint has it: not folded."""
    net = nets.build(
        "EDM2Precond", img_resolution=resolution, img_channels=3, label_dim=1000, model_channels=channels,
        channels_per_head=min(channels, 64),
    )  # fmt: skip
    return fill_(net, torch.Generator().manual_seed(0)).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
