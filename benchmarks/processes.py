"""Parts of benchmarks/gpu.py as processes: beside one another until each is ready, then one after another.

What a part finds is in a file of its own the moment it is found, a line of JSON a row.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.tables import Row

REPOSITORY = Path(__file__).resolve().parents[1]
GRACE = 5.0
"""Seconds that a stopped process has before it is killed."""
_TAIL = 3000  # characters of a failed part's output that are kept
POLL = 0.2
"""Seconds between two looks at a process."""


class Running:
    """The process of one part.

    Attributes:
        status: how it ended, or that it has not. ready_seconds: until it was ready to be timed, or had ended without.
        turn_seconds: that it had the machine for itself.
    """

    def __init__(self, name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        """
        Args:
            command: is given the folder's files to write to at its end, `--rows FILE --ready FILE`.
        """
        self.name, self.status, self.ready_seconds, self.turn_seconds = name, "running", 0.0, 0.0
        stem = re.sub(r"\W+", "-", name)
        self._rows, self._ready, self._log = (folder / f"{stem}{end}" for end in (".jsonl", ".ready", ".log"))
        for file in (self._rows, self._ready):
            file.unlink(missing_ok=True)
        self._began = time.time()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--rows", str(self._rows), "--ready", str(self._ready)], cwd=REPOSITORY,
                env={**environment}, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def is_preparing(self) -> bool:
        """Whether it neither wants its turn yet nor has ended."""
        self._settle()
        if not self.ready_seconds and (self._ready.is_file() or self.status != "running"):
            self.ready_seconds = time.time() - self._began
        return not self.ready_seconds

    def take_turn(self, deadline: float) -> None:
        """Let it measure, alone on this machine, until it ends or is stopped at the deadline."""
        if self.status != "running":
            return
        with alone(deadline) as granted:
            if not granted:
                self.stop("stopped: another process kept the lock")
                return
            began = time.time()
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(b"go\n", max(deadline - time.time(), 0))
                self._settle()
            self.stop("stopped: out of time")
            self.turn_seconds = time.time() - began

    def stop(self, status: str) -> None:
        """End it and all that it started, if it has not ended."""
        if self.status != "running":
            return
        self.status = status
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        self._close()

    def record(self) -> dict[str, Any]:
        """What is known of it: how it ended, seconds, rows; of one that did not end well its last output."""
        known = {
            "status": self.status, "ready_seconds": self.ready_seconds, "turn_seconds": self.turn_seconds,
            "rows": self.rows(),
        }  # fmt: skip
        return known if self.status == "ok" else known | {"output": self._log.read_text(errors="replace")[-_TAIL:]}

    def rows(self) -> list[Row]:
        """What is on disk; the last line may be half written."""
        lines = self._rows.read_text().split("\n")[:-1] if self._rows.is_file() else []
        return [json.loads(line) for line in lines]

    def _settle(self) -> None:
        code = self._process.poll()
        if code is not None and self.status == "running":
            self.status = "ok" if code == 0 else f"failed: exit code {code}"
            self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@contextmanager
def alone(deadline: float) -> Iterator[bool]:
    """Hold the lock that every timing on this machine takes; False if it was not to be had before the deadline."""
    lock = FileLock(Path(tempfile.gettempdir(), "dgfast-timing.lock"))
    try:
        lock.acquire(timeout=max(deadline - time.time(), 0))
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_rows(rows: Iterable[Row | None], file: Path, ready: Path) -> None:
    """In the process of a part: write each row to disk at once; at a None, say that it is ready, and wait."""
    with file.open("a") as out:
        for row in rows:
            if row is None:
                ready.touch()
                if not sys.stdin.readline():
                    sys.exit("nobody is left to give the turn")
                continue
            out.write(json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
