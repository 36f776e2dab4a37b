"""Arrays of an npz file, rows at a time: fifty thousand images need not lie in memory at once."""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dgfast.bounds import open_file
from dgfast.errors import UserError, one_line

_BROKEN = (
    EOFError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
_LENGTHS = {b"\1\0": struct.Struct("<H"), b"\2\0": struct.Struct("<I")}  # of the header, by the format's version
_MOST_TEXT = 1000  # of a header
_TEXT = re.compile(
    r"\{'descr': '(?P<type>[<>|][a-zA-Z]\d{1,3})', 'fortran_order': (?P<by_columns>True|False), "
    r"'shape': \((?P<shape>(\d{1,15}, )*(\d{1,15},?)?)\), \}\s*"
)


@dataclass(frozen=True)
class Header:
    """What an array claims to be."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def headers(path: Path) -> dict[str, Header]:
    """The arrays of the file by name, none of them read.

    Raises:
        UserError: not an npz file, or one of objects, which would be pickles.
    """
    with _opened(path) as archive:
        found = {}
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _header(member)
        if not found:
            raise ValueError("it holds no arrays")
        return found


def rows(path: Path, name: str, most: int) -> Iterator[np.ndarray]:
    """The array's rows in order, at most so many at a time.

    Raises:
        UserError: as `headers`, or the array ends before its last row.
    """
    with _opened(path) as archive, archive.open(f"{name}.npy") as member:
        header = _header(member)
        count, *rest = header.shape
        for start in range(0, count, most):
            shape = (min(most, count - start), *rest)
            size = math.prod(shape) * header.dtype.itemsize
            content = member.read(size)
            if len(content) < size:
                raise ValueError(f"{name} is cut short")
            yield np.frombuffer(content, header.dtype).reshape(shape)


def whole(path: Path, name: str) -> np.ndarray:
    """The whole array. Who asks has looked at its size.

    Raises:
        UserError: as `rows`.
    """
    header = headers(path)[name]
    if not header.shape:
        raise UserError(f"{path}: {name} is a single number, not an array")
    parts = [*rows(path, name, max(header.shape[0], 1))]
    return np.concatenate(parts) if parts else np.empty(header.shape, header.dtype)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(f"{path}: not an npz file ({one_line(error, most=120)})") from error


def _header(member: IO[bytes]) -> Header:
    """What stands before an array (NumPy's format NPY); by NumPy's own reader it would be parsed as Python."""
    start = member.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in _LENGTHS:
        raise ValueError("not an array of NumPy's format 1 or 2")
    layout = _LENGTHS[start[6:]]
    (length,) = layout.unpack(member.read(layout.size))
    text = member.read(min(length, _MOST_TEXT)).decode("latin-1")
    match = _TEXT.fullmatch(text)
    if match is None or match["type"][1] in "OV":
        raise ValueError("an array of something else than numbers, such as Python objects")
    shape = tuple(int(side) for side in match["shape"].replace(",", " ").split())
    if match["by_columns"] == "True" and len(shape) > 1:
        raise ValueError("an array stored column by column; save np.ascontiguousarray of it")
    return Header(shape, np.dtype(match["type"]))
