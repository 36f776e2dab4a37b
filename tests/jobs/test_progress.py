"""Progress: a bar for a terminal, a line now and then for a log file, and no harm where nobody reads."""

import io
import sys

import pytest

from dgfast.progress import Progress, duration, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(1000, steps=5)
    for batch in range(1, 10):
        for _ in range(5):
            clock[0] += 1.0
            progress.step(100)
        progress.drawn(100 * batch)
    progress.note("out of memory")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sampling: 200 of 1,000 images, 18.2 images/s, 44 s left"
    assert len(lines) == 3 and lines[2] == "out of memory" and not any("\r" in line for line in lines)


def test_progress_on_a_terminal_is_a_bar() -> None:
    terminal = Terminal()
    progress = Progress(8, steps=2, stream=terminal)
    progress.step(4)
    progress.drawn(4)
    progress.note("a line beside it")
    progress.drawn(8)
    progress.close()
    shown = terminal.getvalue()
    assert "\r" in shown and "8/8" in shown and "a line beside it\n" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (6000, "1.7 h"), (360000, "100.0 h")],
)
def test_durations_are_said_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nobody_is_there_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has no stream where one was closed before it began."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    say("lost")
    progress = Progress(8, steps=1)
    progress.note("lost")
    progress.drawn(8)
    progress.close()


def test_say_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say("lost")
        say("and once more")
