"""The exceptions for what a user can mend, and the exit codes of the command line.

0: everything that was asked for is there. 1: a bug (a traceback). 2: bad input. 3: stopped in time, see --time-limit.
4: a folder that cannot be written or read any more. 130: Ctrl-C. 143: SIGTERM. After 3, 4, 130 and 143 the same command
goes on where it stopped.
"""

import click

REFUSED = 2
TIME_LIMIT = 3
INTERRUPTED = 130
TERMINATED = 143


class UserError(click.ClickException, ValueError):
    """Bad input: what is wrong, where, and what to do, in one line. The command line exits with code 2."""

    exit_code = REFUSED


class StorageError(UserError):
    """A full disk, a folder that is read-only or gone. The command line exits with code 4."""

    exit_code = 4


class StoppedError(UserError):
    """Ctrl-C, after which the same command goes on. The command line exits with code 130."""

    exit_code = INTERRUPTED


class TerminatedError(StoppedError):
    """SIGTERM, as `StoppedError`. The command line exits with code 143."""

    exit_code = TERMINATED


def one_line(text: object, most: int = 300) -> str:
    """What an error says, fit for a terminal: it may quote a file, control characters included."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:most]).split())
