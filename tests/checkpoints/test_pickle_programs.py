"""Hostile pickles, written by hand: what a program on the stack machine may try."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.convert import refused


def text(content: str) -> bytes:
    return b"\x8c" + bytes([len(content)]) + content.encode()


def glob(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def raw(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


TOUCH = "touch marker"
CALL, ARG, NONE = b"R", b"\x85", b"N"
SYSTEM = b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch marker\x85R."
STORAGE = glob("torch.storage", "_load_from_bytes")
REBUILD = glob("torch._utils", "_rebuild_tensor_v2")
PERSISTENT = glob("torch_utils.persistence", "_reconstruct_persistent_obj")
ORDERED = glob("collections", "OrderedDict")
SCALAR, DTYPE = glob("numpy.core.multiarray", "scalar"), glob("numpy", "dtype")
HOSTILE = {
    "eval": (glob("builtins", "eval") + text("open('marker', 'w')") + ARG + CALL, "'builtins.eval'"),
    "old_global": (b"cposix\nsystem\n" + text(TOUCH) + ARG + CALL, "'posix.system'"),
    "attribute_of_allowed": (glob("collections", "OrderedDict.fromkeys"), "'collections.OrderedDict.fromkeys'"),
    "getattr": (glob("builtins", "getattr") + ORDERED + text("clear") + b"\x86" + CALL, "'builtins.getattr'"),
    "inst": (b"(" + text(TOUCH) + b"iposix\nsystem\n", "opcode INST"),
    "obj": (b"(" + glob("collections", "OrderedDict") + text(TOUCH) + b"o", "opcode OBJ"),
    "newobj_ex": (glob("collections", "OrderedDict") + b")}\x92", "opcode NEWOBJ_EX"),
    "extension": (b"\x82\x01", "opcode EXT1"),
    "persistent_id": (text(TOUCH) + b"Q", "opcode BINPERSID"),
    "old_persistent_id": (b"Ptouch marker\n", "opcode PERSID"),
    "storage_runs": (STORAGE + raw(SYSTEM) + ARG + CALL, "'posix.system'"),
    "storage_is_zip": (STORAGE + raw(b"PK\x03\x04") + ARG + CALL, "opcode PERSID"),
    "storage_calls_dtype": (STORAGE + raw(b"\x80\x02ctorch\nFloatStorage\n)R.") + ARG + CALL, "broken pickle"),
    "object_scalar": (SCALAR + DTYPE + text("O8") + ARG + CALL + raw(SYSTEM) + b"\x86" + CALL, "broken pickle"),
    "number_of_text": (SCALAR + text("f8") + raw(bytes(8)) + b"\x86" + CALL, "where _NumberType belongs"),
    "short_number": (SCALAR + DTYPE + text("f8") + ARG + CALL + raw(bytes(7)) + b"\x86" + CALL, "broken pickle"),
    "parameter_of_text": (glob("torch._utils", "_rebuild_parameter") + text("a") + ARG + CALL, "where Tensor belongs"),
    "tensor_of_text": (REBUILD + text("a") + b"K\x00))t" + CALL, "broken pickle"),
    "state_of_function": (REBUILD + NONE + b"}" + text("__defaults__") + b")s\x86b", "Global where _NumberType"),
    "state_of_dict": (ORDERED + b")" + CALL + b"}" + text("items") + REBUILD + b"sb", "dict where _NumberType belongs"),
    "call_of_dict": (b"})" + CALL, "dict where Global belongs"),
    "arguments": (ORDERED + b"]" + ARG + CALL, "broken pickle"),
    "meta_of_text": (PERSISTENT + text("a") + ARG + CALL, "str where dict belongs"),
    "deep_key": (b"})" + ARG * 200_000 + NONE + b"s", "tuple where str belongs"),
    "deep_value": (b"}" + text("ema") + b")" + ARG * 200_000 + b"s", "tuple where PersistentObject belongs"),
    "huge_bytes": (b"\x8e" + struct.pack("<Q", 2**50), "broken pickle"),
    "huge_memo_index": (NONE + b"r\xff\xff\xff\xff", "no network under 'ema'"),
    "two_values": (NONE + NONE, "does not end with one value"),
    "open_mark": (b"(" + NONE, "does not end with one value"),
    "empty": (b"", "does not end with one value"),
}  # fmt: skip


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (TOUCH,)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """(file name, its bytes, options) -> the line of the refusal, after which nothing may have happened."""
    monkeypatch.chdir(tmp_path)

    def check(name: str, content: bytes, *options: str) -> str:
        Path(name).write_bytes(content)
        line = refused(name, "--out", "b", *options)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert line.rstrip("\n").isprintable() and name in line
        return line

    return check


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_snapshots_do_nothing(hostile: Callable[..., str], case: str) -> None:
    program, complaint = HOSTILE[case]
    assert complaint in hostile("x.pkl", b"\x80\x04" + program + b".")


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_commands_do_not_run(hostile: Callable[..., str], protocol: int) -> None:
    line = hostile("x.pkl", pickle.dumps({"ema": Command()}, protocol))
    assert "asks for the global 'posix.system'" in line or protocol < 2
    line = hostile("x.pkl", pickle.dumps({"ema": None, "loss_fn": [Command()]}, protocol))
    assert "asks for the global 'posix.system'" in line or protocol < 2


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_commands_in_state_dicts_do_not_run(hostile: Callable[..., str], tmp_path: Path, legacy: bool) -> None:
    torch.save({"a": Command()}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    line = hostile("x.pt", (tmp_path / "x.pt").read_bytes(), "--role", "classifier")
    assert "posix.system" in line and "add_safe_globals" not in line


def test_a_global_may_not_colour_the_terminal(hostile: Callable[..., str]) -> None:
    hostile("x.pkl", b"\x80\x04" + text("o\x1b[2Js") + text("sys\ntem") + b"\x93.")
