"""python -m benchmarks.studies.cpu_parts: what each part of the CPU compiler gains, one guided call without it.

All variants take turns, so that a busy machine slows all alike; times are medians.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from unittest.mock import patch

import click
import torch
from torch import Tensor

from benchmarks.measure import check, relative_error, seconds
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS
from dgfast.devices import keep_freed_memory
from dgfast.graph.cache import lowered
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.cpu import build as cpu
from dgfast.runtimes.cpu import onednn
from dgfast.runtimes.cpu.fusion import regions
from dgfast.runtimes.cpu.native import attention, winograd

PARTS: dict[str, tuple[ModuleType, str]] = {
    "fusion": (regions, "fuse"),
    "winograd": (winograd, "replace"),
    "attention": (attention, "replace"),
    "onednn": (onednn, "pack"),
}
_CPU = torch.device("cpu")


@click.command(help=__doc__)
@click.option("--workload", "names", multiple=True, default=["mnist32"], type=click.Choice(list(WORKLOADS)))
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1))
def main(names: tuple[str, ...], batch: int, rounds: int) -> None:
    keep_freed_memory()
    rows = [_row(name, batch, rounds) for name in names]
    table(["guided call", "eager", "compiled", *(f"without {part}" for part in PARTS)], rows)


def _row(name: str, batch: int, rounds: int) -> list[str]:
    workload = WORKLOADS[name]()
    networks = workload.load(_CPU, torch.float32)
    levels = guided_levels(workload, networks, _CPU)
    arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), _CPU)
    function = guided_function(workload, networks, True, _CPU)
    eager = partial(function, *arguments)
    calls: dict[str, Callable[[], Sequence[Tensor]]] = {"eager": eager}
    with torch.no_grad():
        for part in ("", *PARTS):
            with patch.object(*PARTS[part], lambda graph, *batch: None) if part else nullcontext():
                calls[part] = partial(cpu.compile(lowered(function, arguments), batch), *arguments)
            error = relative_error(calls[part](), eager())
            check(f"{name} without {part or 'nothing'}", "eager", error, RUNTIMES["compiled"].tolerance)
        times: dict[str, list[float]] = {variant: [] for variant in calls}
        for _ in range(rounds):
            for variant, call in calls.items():
                times[variant].append(seconds(call))
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    slower = [f"{medians[part] / medians['']:.2f} x" for part in PARTS]
    first = [f"{1e3 * medians['eager']:.0f} ms", f"{1e3 * medians['']:.0f} ms"]
    return [f"{name}, batch {batch}", *first, *slower]


if __name__ == "__main__":
    main()
