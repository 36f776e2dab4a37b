"""Arrays of an npz file, rows at a time: fifty thousand images need not lie in memory at once."""

import math
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

_BROKEN = (EOFError, KeyError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"an array of NumPy's format {version}")
    shape, by_columns, dtype = _HEADERS[version](member)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    if by_columns and len(shape) > 1:
        raise ValueError("an array stored column by column; save np.ascontiguousarray of it")
    return Header(shape, dtype)
