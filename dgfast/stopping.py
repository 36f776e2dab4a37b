"""Ctrl-C and SIGTERM: an orderly end with one line and an exit code, from the first moment on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from click.exceptions import Exit

from dgfast.errors import INTERRUPTED, TERMINATED
from dgfast.progress import say


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it some seconds before it kills."""


@contextmanager
def interruptible(left: str = "stopped before anything was drawn") -> Iterator[None]:
    """SIGTERM becomes an exception as Ctrl-C is one, and either, unless handled inside, one line and an exit code.

    Args:
        left: that line.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as stop:
        say(left, error=True)
        raise Exit(code(stop)) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def code(stop: KeyboardInterrupt) -> int:
    """The exit code that says what stopped a command."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
