"""ONNX files on disk: one, and a second for weights that do not fit into it."""

import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

LIMIT = 2**31 - 2**24
"""Most bytes of weights in a file: protobuf's 2 GB, less some room for what is not weights."""
_METADATA, _KEY, _VALUE = 14, 1, 2  # numbers of onnx.ModelProto's and onnx.StringStringEntryProto's fields
_LONGEST, _MOST_FIELDS = 2**12, 1000  # bytes of an entry that is read, fields of a file that are looked at


def save(model: Any, path: Path) -> None:
    """Write an `onnx.ModelProto`; weights beyond 2 GB go to a second file beside it, and are gone from `model`.

    What lay there before stays if this fails, and no file ever stands beside the weights of another.
    """
    import onnx

    data = data_of(path)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        new = Path(folder, path.name)
        onnx.save(model, str(new), save_as_external_data=large, all_tensors_to_one_file=True, location=data.name)
        remove(path)
        if large:
            data_of(new).chmod(new.stat().st_mode)  # onnx lets the owner alone read it
            data_of(new).replace(data)
        new.replace(path)


def data_of(path: Path) -> Path:
    """Where the weights of an ONNX file are that do not fit into it."""
    return path.with_name(f"{path.name}.data")


def files_of(path: Path) -> list[Path]:
    """The file, and the one of its weights if there is one."""
    return [file for file in (path, data_of(path)) if file.is_file()]


def remove(path: Path) -> None:
    """The file, then the one of its weights."""
    for file in (path, data_of(path)):
        file.unlink(missing_ok=True)


def said_of(path: Path) -> dict[str, str]:
    """The short entries of a file's metadata, without reading the rest, which may be gigabytes.

    It is asked for before ONNX Runtime opens the file: of one that is damaged this is what can be read.
    """
    with path.open("rb") as file:
        entries = [dict(_fields(BytesIO(entry))) for number, entry in _fields(file) if number == _METADATA]
    return {
        entry[_KEY].decode(errors="replace"): entry.get(_VALUE, b"").decode(errors="replace")
        for entry in entries if _KEY in entry
    }  # fmt: skip


def _fields(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of a protobuf message's fields that have a length, but for long ones, up to the first error."""
    for _ in range(_MOST_FIELDS):
        tag = _number(file)
        if tag is None or tag >> 3 == 0 or tag & 7 not in (0, 2):
            return
        size = _number(file)  # with a tag that ends in 0, the field itself
        if size is None:
            return
        if tag & 7 == 2 and size <= _LONGEST:
            yield tag >> 3, file.read(size)
        elif tag & 7 == 2:
            file.seek(min(size, 2**62), 1)


def _number(file: BinaryIO) -> int | None:
    """A number of seven bits a byte, the last of which is below 128; None where there is none."""
    value = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 127) << 7 * place
        if byte[0] < 128:
            return value
    return None
