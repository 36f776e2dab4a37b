"""python -m benchmarks.studies.through: what guidance through the denoiser costs, beside the denoiser by itself.

Of `mnist32`, a call of each guided denoiser, eager and compiled, in turns with the unguided one of the same runtime;
the median of their ratios. Network calls are counted as the plan counts them.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import click
import torch
from torch import Tensor

import dgfast
from dgfast.graph import Function
from dgfast.guidance import Guidance, LossGuidance, Mask, ObservationGuidance, guided_denoiser
from dgfast.runtimes import RUNTIMES

SHAPE = (1, 32, 32)


def mean_square(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    return x_0.square().mean((1, 2, 3))


def methods() -> dict[str, list[Guidance]]:
    known = torch.arange(32 * 32).view(1, 32, 32) % 2

    def observed(method: str, iterations: int = 1, through_network: bool = True) -> list[Guidance]:
        made = ObservationGuidance(
            Mask(known), torch.zeros(SHAPE), method=method, iterations=iterations, through_network=through_network
        )
        return [made.fitted(SHAPE, torch.device("cpu"))]

    return {
        "none": [], "sda without the network": observed("sda", through_network=False), "sda": observed("sda"),
        "dps": observed("dps"), "pigdm": observed("pigdm"), "tmpd": observed("tmpd"), "mmps, 1": observed("mmps"),
        "mmps, 2": observed("mmps", 2), "a loss": [LossGuidance(mean_square, 1.0)],
        "sda and a loss": [*observed("sda"), LossGuidance(mean_square, 1.0)],
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--batch", default=16, show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--runtimes", default="eager,compiled", show_default=True)
@torch.no_grad()
def main(batch: int, repeats: int, runtimes: str) -> None:
    net, sigma = dgfast.load("mnist32").denoiser, torch.ones(batch, dtype=torch.float64)
    inputs = (torch.randn(batch, *SHAPE, dtype=torch.float64), sigma, torch.eye(10)[torch.arange(batch) % 10])
    names = runtimes.split(",")
    click.echo(f"| guidance | backward passes | {' | '.join(names)} |\n|---|---:|{'---:|' * len(names)}")
    plain: dict[str, Function] = {}
    for name, guidances in methods().items():
        cells = []
        for runtime in names:
            run = RUNTIMES[runtime].build(guided_denoiser(net, guidances), inputs)
            ratio = _ratio(run, plain.setdefault(runtime, run), inputs, repeats)
            cells.append(f"{ratio:.2f}")
        click.echo(f"| {name} | {sum(g.backwards for g in guidances)} | {' | '.join(cells)} |")


def _ratio(run: Function, plain: Function, inputs: Sequence[Tensor], repeats: int) -> float:
    """Median time of a call in times of the plain one just before it."""

    def seconds(function: Callable[..., object]) -> float:
        began = time.process_time()
        function(*inputs)
        return time.process_time() - began

    for function in (run, plain):
        function(*inputs)
    return statistics.median(1 / (seconds(plain) / seconds(run)) for _ in range(repeats))


if __name__ == "__main__":
    main()
