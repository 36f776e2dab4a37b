"""Files that mean harm: none runs anything, none ends but in one line, none takes more than SECURITY.md says."""

import os
import pickle
from pathlib import Path

import pytest

from dgfast.errors import UserError
from tests import fuzz
from tests.support import hostile_files
from tests.support.mutations import CANARY, PAYLOADS


def test_fuzzed_files_are_read_or_refused() -> None:
    rows = fuzz.fuzz(1000)
    assert not [outcome for row in rows for outcome in row.bad], fuzz.table(rows)
    verdicts = [{outcome.verdict for outcome in row.outcomes} for row in rows]
    assert all(found == {"accepted", "refused"} for found in verdicts), "a format is always or never refused"


@pytest.mark.parametrize("name", hostile_files.ATTACKS)
def test_files_written_by_hand_are_cheap(tmp_path: Path, name: str) -> None:
    outcome = fuzz.read(hostile_files.read, hostile_files.ATTACKS[name](tmp_path), [])
    harmless = {"memo", "dicts", "key_of_doubled_tuples"}  # much ado, and then a file of plain data
    assert outcome.verdict == ("accepted" if name in harmless else "refused"), outcome


def test_payloads_would_leave_a_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + PAYLOADS[0] + b".")
    assert Path(CANARY).exists()


def _raises(path: Path) -> None:
    raise KeyError("not a user's error")


def _colours(path: Path) -> None:
    raise UserError("\x1b[2J")


def _hoards(path: Path) -> None:
    assert len(bytearray(os.urandom(2**10)) * 2_500_000)


@pytest.mark.parametrize(
    ("reader", "verdict"),
    [
        pytest.param(_raises, "raised", id="other_exception"),
        pytest.param(_colours, "raised", id="control_characters"),
        pytest.param(_hoards, "too large", id="memory"),
        pytest.param(lambda path: path.with_name(CANARY).touch(), "executed", id="canary"),
        pytest.param(lambda path: None, "accepted", id="nothing"),
    ],
)
def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, reader: object, verdict: str) -> None:
    (tmp_path / "x").touch()
    assert fuzz.read(reader, tmp_path / "x", []).verdict == verdict  # type: ignore[arg-type]
