"""What a command tells while it works: a bar on a terminal, a line now and then in a log file."""

import os
import sys
import time
from contextlib import suppress
from typing import TextIO

import click
from tqdm import tqdm

_FIRST_LINE, _BETWEEN_LINES = 10.0, 30.0  # seconds


def say(text: str, error: bool = False) -> None:
    """A line for the user. Nobody reading it, a closed pipe or a full disk, is no reason to stop a job."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed before Python began
        return
    try:
        click.echo(text, file=stream)
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # else Python complains of the rest of the buffer when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """How many images are drawn, on the standard error.

    Args:
        total: images to draw. steps: calls of `step` that a batch takes.
    """

    def __init__(self, total: int, steps: int, name: str = "sampling", stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = sys.stderr if stream is None else stream  # None: closed before Python began
        self._total, self._steps, self._name = total, steps, name
        self._done, self._step, self._batch = 0, 0, 0
        self._began = time.monotonic()
        self._next_line = self._began + _FIRST_LINE
        self._bar = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total, unit="image", desc=name, file=self._stream, dynamic_ncols=True)

    def step(self, batch: int) -> None:
        """A solver step of a batch of so many images is done."""
        self._step, self._batch = self._step % self._steps + 1, batch
        self._show()

    def drawn(self, images: int) -> None:
        """So many images are done by now."""
        self._done, self._step = images, 0
        self._show()

    def note(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is None:
            say(text, error=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Take the bar away from the terminal's last line."""
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.n = min(self._total, self._done + self._batch * self._step // self._steps)
            self._bar.update(0)
        elif now > self._next_line and self._done:
            self._next_line = now + _BETWEEN_LINES
            speed = self._done / (now - self._began)
            left = (self._total - self._done) / speed
            say(
                f"{self._name}: {self._done:,} of {self._total:,} images, {speed:.1f} images/s, {duration(left)} left",
                error=True,
            )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12 s, 5 min, 3.4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
