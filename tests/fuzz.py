"""python -m tests.fuzz --files 10000: hostile files for every reader, and what became of each kind; --by-hand: those
of `tests.support.hostile_files`, one by one.

A file is an honest one with some of its structure changed, and payloads among the changes. A reader may read it or end
with a `UserError`; it may execute nothing, raise nothing else, and stay within the limits that SECURITY.md states.
Files are read one by one in a process of their own, in which an audit hook watches; one that dies or hangs is counted.
"""

import gc
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import click

from dgfast.errors import UserError
from tests.support import hostile_files
from tests.support.hostile_files import ATTACKS
from tests.support.hostile_formats import FORMATS, Format
from tests.support.mutations import CANARY

_SPARE, _TIMES, _SECONDS, _SECONDS_A_MEGABYTE = 1e9, 2, 10.0, 1.0
_PATIENCE = 90  # seconds of the clock, on a busy machine, before a process counts as hung
_ROOM = 6 * 2**30  # bytes of address space beyond what Python and torch take, so that a bomb does not end the machine
_EVENTS = {
    "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "os.mkdir", "os.remove", "os.rename",
    "subprocess.Popen", "pickle.find_class", "ctypes.dlopen", "socket.connect", "urllib.Request", "shutil.rmtree",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one file: "accepted", "refused", "executed", "raised", "too slow", "too large" or "died"."""

    verdict: str
    told: str = ""
    seconds: float = 0.0
    peak: float = 0.0


@dataclass
class Row:
    """The outcomes of a format; `bad` are those that must not be."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def bad(self) -> list[tuple[int, Outcome]]:
        return [(i, o) for i, o in enumerate(self.outcomes) if o.verdict not in ("accepted", "refused")]

    def cells(self) -> list[str]:
        count = {verdict: sum(o.verdict == verdict for o in self.outcomes) for verdict in ("refused", "accepted")}
        executed = sum(o.verdict == "executed" for o in self.outcomes)
        slowest, peak = (max((getattr(o, what) for o in self.outcomes), default=0) for what in ("seconds", "peak"))
        numbers = len(self.outcomes), count["refused"], count["accepted"]
        return [self.name, *map(str, numbers), f"{slowest:.2f} s", f"{peak / 1e6:.0f} MB", str(executed),
                str(len(self.bad) - executed)]  # fmt: skip


def fuzz(files: int, seed: int = 0, formats: Sequence[Format] = FORMATS) -> list[Row]:
    """Read that many files, as many of each format."""
    rows = [Row(a_format.name) for a_format in formats]
    jobs = [(FORMATS.index(formats[i % len(formats)]), i // len(formats)) for i in range(files)]
    done = 0
    while done < len(jobs):
        for outcome in _outcomes(jobs[done:], seed):
            rows[done % len(formats)].outcomes.append(outcome)
            done += 1
    return rows


def _outcomes(jobs: list[tuple[int, int]], seed: int) -> Iterator[Outcome]:
    """Outcomes of the jobs, by a process of their own, until that dies."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, jobs, seed), daemon=True)
    process.start()
    there.close()
    try:
        for _ in jobs:
            if not here.poll(_PATIENCE):
                yield Outcome("too slow", f"no end after {_PATIENCE} s", _PATIENCE)
                return
            yield here.recv()
    except EOFError:
        process.join()
        yield Outcome("died", f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


# In the process that reads --------------------------------------------------------------------------------------------
def _work(connection: Connection, jobs: list[tuple[int, int]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in sorted({number for number, _ in jobs}):
            FORMATS[number].read(FORMATS[number].write_honest(folder))  # whatever is imported late, is now
        gc.freeze()
        executed = _watch()
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM, in_use + _ROOM))
        for number, index in jobs:
            path = FORMATS[number].write(random.Random(f"{seed} {number} {index}"), folder)
            connection.send(read(FORMATS[number].read, path, executed))


def _watch() -> list[str]:
    """A list that every event goes into that a reader may not cause."""
    events: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        source = event in ("exec", "compile") and "<" in str(getattr(arguments[0], "co_filename", arguments[-1]))
        canary = event in ("import", "open") and CANARY in str(arguments[0])
        if event in _EVENTS or source or canary:
            events.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return events


def read(reader: Callable[[Path], object], path: Path, executed: list[str]) -> Outcome:
    """What became of the file at `path`."""
    size = path.stat().st_size
    executed.clear()
    gc.collect()  # or what others left behind, freed meanwhile, hides what the reader takes
    memory, start = _restart_peak(), time.process_time()
    verdict, told = "accepted", ""
    try:
        reader(path)
    except UserError as error:
        verdict, told = "refused", error.message
    except BaseException as error:
        verdict, told = "raised", f"{type(error).__name__}: {error}"
    seconds, peak = time.process_time() - start, _memory("VmHWM") - memory
    if executed or Path(CANARY).exists() or path.with_name(CANARY).exists():
        verdict, told = "executed", "; ".join(executed) or "the canary is there"
    elif verdict == "refused" and not told.isprintable():
        verdict = "raised"
    elif seconds > _SECONDS + _SECONDS_A_MEGABYTE * size / 1e6:
        verdict = "too slow"
    elif peak > _TIMES * size + _SPARE or any(
        word in told for word in ("MemoryError", "t allocate", "to allocate", "bad_alloc")
    ):
        verdict = "too large"
    return Outcome(verdict, told, seconds, peak)


def _restart_peak() -> float:
    """Bytes in use; what the peak is from now on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM")


def _memory(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def by_hand() -> list[tuple[str, int, Outcome]]:
    """Name, bytes and outcome of each attack written by hand."""
    outcomes = []
    for name, write in ATTACKS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder))
            size = sum(file.stat().st_size for file in (path, *path.glob("*")) if file.is_file())
            outcomes.append((name, size, read(hostile_files.read, path, [])))
    return outcomes


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned, with a head and their sum."""
    total = Row("all", [outcome for row in rows for outcome in row.outcomes])
    head = ["format", "files", "refused", "accepted", "slowest", "most memory", "executed", "other failures"]
    return _aligned([head, *(row.cells() for row in (*rows, total))])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@click.command(help=__doc__)
@click.option("--files", default=1000, show_default=True, help="How many files to read.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other files.")
@click.option("--only", help="The name of one format.")
@click.option("--by-hand", "hand", is_flag=True, help="Read the files written by hand instead.")
def main(files: int, seed: int, only: str | None, hand: bool) -> None:
    if hand:
        lines = [[name, f"{size / 1e6:.2f} MB", o.verdict, f"{o.seconds:.1f} s", f"{o.peak / 1e6:.0f} MB", o.told[:150]]
                 for name, size, o in by_hand()]  # fmt: skip
        click.echo(_aligned([["attack", "file", "verdict", "time", "memory", "told"], *lines]))
        sys.exit(any(line[2] not in ("accepted", "refused") for line in lines))
    formats = [a_format for a_format in FORMATS if only in (None, a_format.name)]
    rows = fuzz(files, seed, formats)
    click.echo(table(rows))
    for row in rows:
        for index, outcome in row.bad:
            click.echo(f"{row.name} {index}: {outcome.verdict}, {outcome.told[:300]!a}")
    sys.exit(any(row.bad for row in rows))


if __name__ == "__main__":
    main()
