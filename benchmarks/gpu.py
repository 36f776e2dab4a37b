"""python benchmarks/gpu.py --out DIR: everything that dgfast has to say about a CUDA machine that is there for minutes.

Needs no network. Every part is a process of its own, so that one that fails, hangs or crashes leaves the others alone.
All compile at the same time, into one cache; then one after another is timed, the most interesting first. What a part
finds is in DIR at once; DIR/table.md and DIR/results.json have all of it, also after SIGTERM.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

if __name__ == "__main__" and not __package__:  # run by its path: no file here stands in for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_parts import PARTS
from benchmarks.part import Part
from benchmarks.processes import GRACE, POLL, Running, replace_file
from benchmarks.tables import tables

START = 15.0
"""Seconds until the processes have imported torch and opened the device."""
COMPILING = 75.0
"""Seconds that compiling takes however many cores there are: tracing and inductor's own work are not divided."""
LEFT_OUT = "left out: does not fit"
_CACHES = {"DGFAST_CACHE_DIR": "graphs", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def estimate(parts: Sequence[Part], cores: int) -> float:
    """Seconds that these parts take on a bare machine: compiled together, then measured one by one."""
    work = sum(part.compiling for part in parts)
    return START + (max(COMPILING, work / cores) if work else 0) + sum(part.measuring for part in parts)


def fitting(parts: Sequence[Part], seconds: float, cores: int) -> list[Part]:
    """As many of the first parts as fit into that time."""
    count = len(parts)
    while count and estimate(parts[:count], cores) > seconds - GRACE:
        count -= 1
    return list(parts[:count])


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Try the script itself: tiny sizes that say nothing about speed.")
@click.option("--part", "names", type=click.Choice(list(PARTS)), multiple=True, help="Default: all that fit.")
@click.option("--cores", type=click.IntRange(min=1), default=os.cpu_count(), help="Default: all of this machine.")
@click.option("--list", "listing", is_flag=True, help="Say which parts there are and what fits; measure nothing.")
def main(
    out: Path | None, minutes: float, device: str, small: bool, names: tuple[str, ...], cores: int, listing: bool
) -> None:  # fmt: skip
    began = time.time()
    asked = [PARTS[name] for name in names or PARTS]
    if minutes != minutes:
        raise click.BadParameter("not a number", param_hint="--minutes")
    chosen = asked if small or names else fitting(asked, 60 * minutes, cores)
    if listing:
        click.echo(_listed(asked, chosen, cores))
        return
    if out is None:
        raise click.UsageError("give --out, a folder for the results")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise click.BadParameter(f"{device!r} is not cpu, cuda or cuda:1, ...", param_hint="--device")
    if device.startswith("cuda") and not _cuda_works():
        click.echo("Error: no CUDA device here; to try the script itself, use --device cpu --small", err=True)
        sys.exit(2)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", "--device", device, "--out", str(out)]
    run = Run(chosen, command + ["--small"] * small, out, began + 60 * minutes - GRACE)
    try:
        run.prepare(cores)
        run.measure()
    finally:
        for process in run.started:
            process.stop("stopped: interrupted")
        run.write({part.name: {"status": LEFT_OUT} for part in asked if part not in chosen})
        signal.signal(signal.SIGTERM, before)
    sys.exit(any(process.status.startswith("failed") for process in run.started))


class Run:
    """The processes of some parts.

    Attributes:
        started: in the parts' order.
    """

    def __init__(self, parts: Sequence[Part], command: list[str], out: Path, deadline: float) -> None:
        self.started: list[Running] = []
        self._parts, self._command, self._out, self._deadline = parts, command, out, deadline

    def prepare(self, cores: int) -> None:
        """Compile all, a process a core; what is not ready when the measuring must begin is stopped."""
        environment, last = _environment(cores, len(self._parts)), sum(part.measuring for part in self._parts)
        waiting = list(self._parts)
        while time.time() < self._deadline - last:
            preparing = sum(process.is_preparing() for process in self.started)
            if not waiting and not preparing:
                return
            if waiting and preparing < cores:
                name = waiting.pop(0).name
                self.started.append(Running(name, [*self._command, "--part", name], self._out, environment))
            else:
                time.sleep(POLL)
        for process in self.started:
            if process.is_preparing():
                process.stop("stopped: not ready in time")

    def measure(self) -> None:
        """Give each its turn; what is known by then is written after every one."""
        for process in self.started:
            process.take_turn(self._deadline)
            click.echo(f"{process.name}: {process.status}, {len(process.rows())} rows")
            self.write()

    def write(self, others: dict[str, dict[str, Any]] | None = None) -> None:
        """The records so far, and those of parts that were not started."""
        records: dict[str, dict[str, Any]] = {process.name: process.record() for process in self.started}
        records |= {part.name: {"status": "not begun: out of time"} for part in self._parts[len(self.started) :]}
        records |= others or {}
        replace_file(self._out / "results.json", json.dumps({"parts": records}, indent=1))
        replace_file(self._out / "table.md", _page(records))


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _environment(cores: int, processes: int) -> dict[str, str]:
    """One cache for all, and so many compilers each that there are two for a core: none works all the time."""
    cache = Path(tempfile.gettempdir(), "dgfast-gpu-cache")
    workers = max(2, 2 * cores // max(processes, 1))
    own = {name: str(cache / folder) for name, folder in _CACHES.items()}
    return own | {"TORCHINDUCTOR_COMPILE_THREADS": str(workers)} | os.environ


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def _page(records: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        {
            "part": name, "how it ended": record["status"], "ready after, s": record.get("ready_seconds", ""),
            "alone, s": record.get("turn_seconds", ""), "on a GPU": "never before" if PARTS[name].new else "",
        }
        for name, record in records.items()
    ]  # fmt: skip
    texts = [tables(rows)]
    for name, record in records.items():
        title = f"## {name}{' (never ran on a GPU before)' if PARTS[name].new else ''}"
        texts += [f"{title}\n\n{tables(record['rows'])}"] if record.get("rows") else []
    return "\n\n".join(texts) + "\n"


def _listed(asked: Iterable[Part], chosen: Sequence[Part], cores: int) -> str:
    rows = [
        {
            "part": part.name, "compiling, core-seconds": f"{part.compiling:g}", "alone, s": f"{part.measuring:g}",
            "": "" if part in chosen else LEFT_OUT,
        }
        for part in asked
    ]  # fmt: skip
    return f"{tables(rows)}\n\nabout {estimate(chosen, cores):.0f} s on {cores} cores"


if __name__ == "__main__":
    main()
