"""python -m tests.faults: what becomes of a sampling job when something goes wrong, as a table.

Each fault hits a small job of two processes (as torchrun would start them, forked here so that each costs a second
instead of ten). Then the same command runs again, until it says that everything is there. The folder must hold the very
bytes of an undisturbed run: no image lost, none twice, none changed, nothing left over.
"""

import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from click.exceptions import Exit

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.config import SamplingConfig
from dgfast.errors import INTERRUPTED, UserError
from dgfast.sample import main as sample
from dgfast.sampler import Sampler
from dgfast.stepping import Stepping

_STOPS = (signal.SIGINT, signal.SIGTERM)
IMAGES = 40
_BATCH = 4
_STEPS = 2  # which take a third of the job's time
_KEYWORDS = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
_IMPORTED = ("dgfast.drawing", "numpy.ctypeslib", "PIL.JpegImagePlugin")  # by a command, which each fork would pay for
_FORMATS = ("--format", "npz", "--format", "png", "--format", "grid", "--format", "adm")
_STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
_GRACE = 20.0  # seconds after which a process counts as hanging


@dataclass
class Row:
    """What a fault did, over all its runs, compared with an undisturbed run."""

    fault: str
    runs: int = 0
    lost: int = 0
    changed: int = 0
    left_over: int = 0
    hanging: int = 0
    exits: Counter[int] = field(default_factory=Counter)

    @property
    def harmless(self) -> bool:
        return self.runs > 0 and not (self.lost or self.changed or self.left_over or self.hanging)


class Job:
    """A small sampling job.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        torch.manual_seed(0)
        net = nets.build("EDMPrecond", **_KEYWORDS)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        bundle = Bundle(scratch / "bundle", "small", {}, SamplingConfig(num_steps=_STEPS))
        bundles.write(bundles.with_net(bundle, "score", net, "EDMPrecond", _KEYWORDS))
        # In a process of its own, as torchrun's: one that is forked must not have its threads.
        self._agent = subprocess.Popen([sys.executable, "-c", _STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._agent.stdout is not None
        self._port, self._attempt = self._agent.stdout.readline().decode().strip(), 0
        began = time.monotonic()
        codes = self.run(scratch / "undisturbed")
        self.seconds = time.monotonic() - began
        assert codes == [0, 0], f"the undisturbed job ended with {codes}: {self.log()}"
        self.files = contents(scratch / "undisturbed")

    def run(
        self, out: Path, processes: int = 2, disturb: Callable[[list[int]], None] | None = None, **how: Any
    ) -> list[int]:
        """Run the job in so many processes; their exit codes, -1 for one that hangs."""
        self._attempt += 1
        team = {
            "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port,
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(self._attempt),
        }  # fmt: skip
        children = [
            self._fork(out, team | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **how) for rank in range(processes)
        ]
        if disturb is not None:
            disturb(children)
        return [_waited(child) for child in children]

    def close(self) -> None:
        self._agent.communicate()

    def log(self) -> str:
        return (self.scratch / "log").read_text()

    def _fork(
        self, out: Path, environment: dict[str, str], change: Callable[[], None] = lambda: None, output: str = ""
    ) -> int:
        options = ["--bundle", str(self.scratch / "bundle"), "--seeds", f"0-{IMAGES - 1}", "--batch", str(_BATCH)]
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # Python's own hooks after a fork would swallow them
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            return child
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            os.environ |= environment
            log = os.open(output or self.scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            change()
            command = [*options, "--device", "cpu", *_FORMATS, "--out", str(out)]
            code = sample.main(command, standalone_mode=False) or 0
        except UserError as error:
            print(f"Error: {error.message}", file=sys.stderr, flush=True)
            code = error.exit_code
        except Exit as stop:
            code = stop.exit_code
        except KeyboardInterrupt:  # before there was anything to stop
            code = INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a job's folder but what tells of its runs."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("manifest.json", ".lock")}


def _waited(child: int) -> int:
    end = time.monotonic() + _GRACE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) % 256
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _GRACE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def _judge(row: Row, job: Job, out: Path, codes: list[int]) -> None:
    """Run the job to its end, now undisturbed, and hold its files against those of the undisturbed run."""
    row.runs += 1
    row.exits.update(codes[:1])
    again = job.run(out, processes=1 + row.runs % 2)
    row.hanging += [*codes, *again].count(-1)
    if again[0] != 0:
        row.lost += IMAGES
    files = contents(out) if out.is_dir() else {}
    row.lost += sum(name.endswith(".png") and name != "grid.png" for name in job.files.keys() - files.keys())
    row.left_over += len(files.keys() - job.files.keys())
    row.changed += sum(files[name] != job.files[name] for name in files.keys() & job.files.keys())
    shutil.rmtree(out, ignore_errors=True)


# Faults ---------------------------------------------------------------------------------------------------------------
def killed(job: Job, kills: int, number: signal.Signals, seed: int = 0) -> Row:
    """One process of two, or both, at random moments; the rest gets SIGTERM, as torchrun sends it."""
    row, moments = Row(f"{number.name} at {kills} random moments"), random.Random(f"{seed} {number}")
    latest, out = job.seconds, job.scratch / number.name
    while row.runs < kills:
        delay, victims = moments.uniform(0, latest), moments.choice([[0], [1], [0, 1]])

        def disturb(children: list[int], delay: float = delay, victims: list[int] = victims) -> None:
            time.sleep(delay)
            for rank, child in enumerate(children):
                os.kill(child, number if rank in victims else signal.SIGTERM)  # a zombie does not mind

        codes = job.run(out, disturb=disturb)
        if codes == [0, 0]:  # the job was faster than the undisturbed one: nothing has been killed
            latest *= 0.95
            shutil.rmtree(out)
        else:
            _judge(row, job, out, codes)
    return row


def full_disk(job: Job) -> Row:
    """No file can become larger than so many bytes: the shards, or only the one npz of all images."""
    row = Row("file system full (RLIMIT_FSIZE)")
    for limit in (0, 300, 1500, 8000):
        out = job.scratch / f"full-{limit}"

        def change(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        codes = job.run(out, processes=1, change=change, output="/dev/null")
        row.left_over += len(list(out.rglob("*.partial"))) if out.is_dir() else 0
        _judge(row, job, out, codes)
    return row


def vanished_folder(job: Job) -> Row:
    row = Row("folder moved away while drawing")

    def disturb(children: list[int]) -> None:
        out = job.scratch / "vanishing"
        _until(lambda: any(out.glob("images-*.npz")))
        out.rename(job.scratch / "moved")

    codes = job.run(job.scratch / "vanishing", processes=1, disturb=disturb)
    _judge(row, job, job.scratch / "moved", codes)
    return row


def damaged(job: Job, seed: int = 0) -> Row:
    """A byte flipped, a tail cut off or a file removed, of every kind of file of a finished job."""
    row, chance = Row("a finished job's file damaged"), random.Random(seed)
    for name in ("images-00003.npz", "000000/000017.png", "grid.png", next(n for n in job.files if "samples" in n)):
        for how in ("flip", "cut", "remove"):
            out = job.scratch / "damaged"
            shutil.copytree(job.scratch / "undisturbed", out)
            content = bytearray((out / name).read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            (out / name).write_bytes(content if how == "flip" else content[:-7])
            if how == "remove":
                (out / name).unlink()
            _judge(row, job, out, [0])
    return row


def two_jobs(job: Job) -> Row:
    """The same command twice at once: one of them draws, the other is refused and changes nothing."""
    row = Row("two jobs at once in one folder")
    for run in range(3):
        out, ended = job.scratch / f"two-{run}", job.scratch / f"ended-{run}"
        second: list[int] = []

        def disturb(children: list[int], out: Path = out, second: list[int] = second, ended: Path = ended) -> None:
            _until((out / "manifest.json").exists)
            second += job.run(out, processes=1)
            ended.touch()

        def change(ended: Path = ended) -> None:
            call = Sampler.__call__

            def waiting(self: Sampler, *arguments: Any) -> Any:
                _until(ended.exists)  # the first job draws while the second comes and goes
                return call(self, *arguments)

            Sampler.__call__ = waiting  # type: ignore[method-assign, assignment]

        first = job.run(out, processes=1, disturb=disturb, change=change)
        if first != [0] or second != [2]:
            row.lost += IMAGES
        row.exits.update(second)
        _judge(row, job, out, first)
    return row


def nan(job: Job) -> Row:
    """The network returns NaN from the third batch on."""
    row = Row("NaN from the network")

    def change() -> None:
        call, calls = Stepping.function, []

        def broken(self: Stepping, *arguments: Any) -> Any:
            calls.append(1)
            function, two_batches = call(self, *arguments), 2 * (2 * _STEPS - 1)
            return (lambda *x: tuple(y * torch.nan for y in function(*x))) if len(calls) > two_batches else function

        Stepping.function = broken  # type: ignore[method-assign, assignment]

    _judge(row, job, job.scratch / "nan", job.run(job.scratch / "nan", processes=1, change=change))
    return row


def out_of_memory(job: Job) -> Row:
    """Not even one image fits any more after some batches."""
    row = Row("out of memory for good")

    def change() -> None:
        call, calls = Sampler.__call__, []

        def limited(self: Sampler, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return call(self, *arguments)

        Sampler.__call__ = limited  # type: ignore[method-assign, assignment]

    _judge(row, job, job.scratch / "oom", job.run(job.scratch / "oom", processes=1, change=change))
    return row


def nobody_reads(job: Job) -> Row:
    """The standard output is a full disk: the images are what matters."""
    row = Row("standard output full")
    codes = job.run(job.scratch / "full", processes=1, output="/dev/full")
    row.lost += IMAGES * (codes != [0])
    _judge(row, job, job.scratch / "full", codes)
    return row


def all_faults(scratch: Path, kills: int) -> Iterator[Row]:
    job = Job(scratch)
    try:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            yield killed(job, kills, number)
        for fault in (full_disk, vanished_folder, damaged, two_jobs, nan, out_of_memory, nobody_reads):
            yield fault(job)
    finally:
        job.close()


@click.command(help=__doc__)
@click.option("--kills", default=100, show_default=True, help="Random moments of each signal.")
def main(kills: int) -> None:
    torch.set_num_threads(1)  # a process that is forked must not have any threads
    for name in _IMPORTED:
        importlib.import_module(name)
    click.echo("| fault | runs | images lost | files changed | left over | hanging | exit codes |")
    click.echo("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for row in all_faults(Path(scratch), kills):
            exits = ", ".join(f"{code}: {count}" for code, count in sorted(row.exits.items()))
            numbers = row.runs, row.lost, row.changed, row.left_over, row.hanging
            click.echo(f"| {row.fault} | {' | '.join(map(str, numbers))} | {exits} |")
            rows.append(row)
    sys.exit(not all(row.harmless for row in rows))


if __name__ == "__main__":
    main()
