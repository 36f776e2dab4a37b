"""python -m benchmarks.studies.compile_time: seconds to compile a workload's functions, in the cache as it is."""

import time

import click
import torch

from benchmarks.runtimes import RUNTIMES
from benchmarks.workloads import WORKLOADS
from dgfast.devices import pick_device
from dgfast.sampler import Sampler


@click.command(help=__doc__)
@click.option("--workload", default="mnist32", show_default=True, type=click.Choice(list(WORKLOADS)))
@click.option("--runtime", default="compiled", show_default=True, type=click.Choice(list(RUNTIMES)))
@click.option("--batch", default=2, show_default=True)
@click.option("--device", help="default: CUDA where there is one")
def main(workload: str, runtime: str, batch: int, device: str | None) -> None:
    at, made = pick_device(device), WORKLOADS[workload]()
    networks = made.load(at, torch.float32)
    began = time.perf_counter()
    Sampler(networks, made.sampling, made.guidance, runtime=RUNTIMES[runtime]).prepare(batch)
    click.echo(f"{workload}, batch {batch}: {runtime}, and called once, in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
