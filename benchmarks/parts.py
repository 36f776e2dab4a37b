"""What `benchmarks/gpu.py` runs beside the tests and benchmarks: python -m benchmarks.parts PART.

Each part prints a table in markdown and writes the same as JSON to --out.
"""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import facts
from benchmarks.measure import PRECISIONS, Call, matmul_ceiling, precision, relative_error, seconds, synchronised
from benchmarks.runtimes import RUNTIMES
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS, Workload
from dgfast import Networks, Sampler
from dgfast.devices import pick_device
from dgfast.graph.cache import lowered
from dgfast.runtimes import Runtime
from dgfast.runtimes.cuda.build import by_inductor
from dgfast.runtimes.cuda.capture import capture
from dgfast.runtimes.cuda.streams import concurrent

_PROFILE_ROWS = 25

_device = click.option("--device", default="cuda", show_default=True)
_out = click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
_workload = click.option("--workload", type=click.Choice(list(WORKLOADS)), required=True)
_runtime = click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="compiled", show_default=True)
_batch = click.option("--batch", type=click.IntRange(min=1), required=True)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@_device
@_out
@click.option("--seconds", type=float, default=2.0, show_default=True, help="For each size of a matrix product.")
def environment(device: str, out: Path, seconds: float) -> None:
    """The machine, the versions, and the fastest matrix product in every number format."""
    at = pick_device(device)
    known = facts(at)
    names = list(PRECISIONS) if at.type == "cuda" else ["float32", "bf16"]
    ceilings = {name: matmul_ceiling(at, name, seconds) / 1e12 for name in names}
    write(out, {"machine": known, "matmul_tflop_per_second": ceilings})
    table(["", ""], [[name, str(value)] for name, value in known.items()])
    table(["matrix product", "TFLOP/s"], [[name, f"{value:.3g}"] for name, value in ceilings.items()])


@main.command()
@_device
@_out
@_workload
@_runtime
@_batch
@click.option("--precision", "names", type=click.Choice(list(PRECISIONS)), multiple=True, required=True)
def parity(device: str, out: Path, workload: str, runtime: str, batch: int, names: tuple[str, ...]) -> None:
    """Errors against eager float32 by noise level: of one guided call, and of the state of a whole run."""
    at, chosen, seeds = pick_device(device), WORKLOADS[workload](), range(batch)
    with precision("float32"):
        exact = chosen.load(at, torch.float32)
        calls = _guided_calls(chosen, exact, RUNTIMES["eager"], seeds, at)
        states = _trajectory(chosen, exact, RUNTIMES["eager"], seeds, at)
    errors: dict[str, dict[str, list[float]]] = {}
    for name in names:
        with precision(name):
            networks = chosen.load(at, PRECISIONS[name])
            for way in dict.fromkeys(("eager", runtime)):
                tried = RUNTIMES[way]
                errors[f"{way} {name}"] = {
                    "call": _errors(_guided_calls(chosen, networks, tried, seeds, at), calls),
                    "state": _errors(_trajectory(chosen, networks, tried, seeds, at), states),
                }
    write(out, {"workload": workload, "batch": batch, "errors": errors} | _sigmas(calls, states))
    for what, truth in (("call", calls), ("state", states)):
        rows = [[f"{s:.4g}", *(f"{e[what][i]:.1e}" for e in errors.values())] for i, s in enumerate(truth)]
        table([f"sigma ({workload}, error of the {what})", *errors], rows)


@main.command(name="profile")
@_device
@_out
@_workload
@_runtime
@_batch
@click.option("--precision", "name", type=click.Choice(list(PRECISIONS)), required=True)
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="File for Perfetto, *.json.gz.")
def profile_one_call(device: str, out: Path, workload: str, runtime: str, batch: int, name: str, trace: Path) -> None:
    """Where the time of one guided call goes: a table, and a trace."""
    at, chosen = pick_device(device), WORKLOADS[workload]()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if at.type == "cuda" else [])]
    with precision(name), torch.no_grad():
        networks = chosen.load(at, PRECISIONS[name])
        levels = guided_levels(chosen, networks, at)
        arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), at)
        call = RUNTIMES[runtime].whole(guided_function(chosen, networks, True, at), arguments)
        call(*arguments)
        with profile(activities=activities) as profiled:
            call(*arguments)
            if at.type == "cuda":
                torch.cuda.synchronize(at)
    profiled.export_chrome_trace(str(trace))
    spent = attrgetter(f"self_{'device' if at.type == 'cuda' else 'cpu'}_time_total")
    events = sorted(profiled.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, events))
    top = [{"name": e.key, "microseconds": spent(e), "calls": e.count} for e in events[:_PROFILE_ROWS]]
    write(out, {"workload": workload, "batch": batch, "precision": name, "total_microseconds": total, "top": top})
    rows = [[e["name"], f"{e['microseconds']:.0f}", f"{e['microseconds'] / total:.1%}", str(e["calls"])] for e in top]
    table([f"{workload}, {runtime}, batch {batch}, {name}", "us", "share", "calls"], rows)


@main.command()
@_device
@_out
@_workload
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, required=True)
@click.option("--precision", "name", type=click.Choice(list(PRECISIONS)), required=True)
def streams(device: str, out: Path, workload: str, batches: tuple[int, ...], name: str) -> None:
    """One guided call in a CUDA graph: compiled whole, and its networks on a stream each."""
    at, chosen = pick_device(device), WORKLOADS[workload]()
    found: dict[int, dict[str, float]] = {}
    with precision(name), torch.no_grad():
        networks = chosen.load(at, PRECISIONS[name])
        levels = guided_levels(chosen, networks, at)
        for batch in batches:
            arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), at)
            graph = lowered(guided_function(chosen, networks, True, at), arguments)
            one = capture(by_inductor(graph), arguments)
            several = capture(concurrent(graph, lambda part, name: by_inductor(part)), arguments)
            error = relative_error(several(*arguments), one(*arguments))
            times = [_median(synchronised(partial(call, *arguments), at)) for call in (one, several)]
            found[batch] = {"whole": times[0], "streams": times[1], "difference": error}
    write(out, {"workload": workload, "precision": name, "seconds": found})
    rows = [[str(b), f"{f['whole']:.3g}", f"{f['streams']:.3g}", f"{f['difference']:.1e}"] for b, f in found.items()]
    table([f"batch ({workload}, {name})", "whole, s", "a stream each, s", "difference"], rows)


def _median(call: Call, rounds: int = 30) -> float:
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def _guided_calls(
    workload: Workload, networks: Networks, runtime: Runtime, seeds: Sequence[int], device: torch.device
) -> dict[float, list[Tensor]]:
    """Noise level -> results of one guided call there."""
    levels = guided_levels(workload, networks, device)
    arguments = [noise_at([level] * len(seeds), networks, seeds, device) for level in levels]
    call = runtime.whole(guided_function(workload, networks, True, device), arguments[0])
    with torch.no_grad():
        return {
            level: [result.clone() for result in call(*given)] for level, given in zip(levels, arguments, strict=True)
        }


def _trajectory(
    workload: Workload, networks: Networks, runtime: Runtime, seeds: Sequence[int], device: torch.device
) -> dict[float, list[Tensor]]:
    """Noise level -> the solver's state when it arrives there, 0 for the images."""
    sampler = Sampler(networks, workload.sampling, workload.guidance, device, runtime)
    levels = [*(step.sigma for step in sampler.steps[1:]), 0.0]
    states: dict[float, list[Tensor]] = {}
    sampler(seeds, on_step=lambda step, x, *_: states.update({levels[step.index]: [x.clone()]}))
    return states


def _errors(tried: dict[float, list[Tensor]], truth: dict[float, list[Tensor]]) -> list[float]:
    return [relative_error(tried[sigma], truth[sigma]) for sigma in truth]


def _sigmas(calls: dict[float, list[Tensor]], states: dict[float, list[Tensor]]) -> dict[str, list[float]]:
    return {"call_sigmas": list(calls), "state_sigmas": list(states)}


def table(header: list[str], rows: list[list[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        click.echo(f"| {' | '.join(row)} |")
    click.echo()


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
