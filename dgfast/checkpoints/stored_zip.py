"""The members of a zip file that compresses nothing, as torch.save writes it.

Every size is held against the file before a byte of a member is read: none is compressed, none overlaps another, none
has a name twice, and the directory is no larger than `bounds.ZIP_DIRECTORY`.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import torch
from torch import Tensor

from dgfast import bounds
from dgfast.checkpoints.pickle_values import require

_END, _END_64, _LOCATOR_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_IN_EXTRA, _ENCRYPTED = 0xFFFFFFFF, 1


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of a member lie in the file; `checksum` is its CRC-32, or 0 if its writer took none."""

    start: int
    size: int
    checksum: int


def members(stream: IO[bytes]) -> dict[bytes, Member]:
    """All members by name.

    Raises:
        RefusedError: anything in it that torch.save does not write.
        struct.error: the file ends too early.
    """
    start, size, count = _directory(stream)
    require(size <= bounds.ZIP_DIRECTORY, f"its zip directory has {size:,} bytes, more than any checkpoint needs")
    stream.seek(start)
    by_name: dict[bytes, Member] = {}
    occupied = []
    for name, offset, length, checksum in _entries(stream.read(size)):
        require(name not in by_name, f"its zip directory has two members {name!r:.80}")
        data = _data_start(stream, name, offset)
        by_name[name] = Member(data, length, checksum)
        occupied.append((offset, data + length))
    occupied = [*sorted(occupied), (start, start + size)]
    apart = all(end <= begin for (_, end), (begin, _) in pairwise(occupied))
    require(apart, "members of its zip directory overlap, or reach beyond the file")
    require(len(by_name) == count, f"its zip directory has {len(by_name):,} members where it counts {count:,}")
    return by_name


def read(stream: IO[bytes], member: Member) -> Tensor:
    """The bytes of a member, uint8 [size].

    Raises:
        RefusedError: they are not those that were written.
    """
    content = torch.empty(member.size, dtype=torch.uint8)
    stream.seek(member.start)
    buffer = content.numpy().data
    whole = stream.readinto(buffer) == member.size  # type: ignore[attr-defined]
    require(whole and member.checksum in (0, zlib.crc32(buffer)), "it is damaged: a checksum in it does not fit")
    return content


def _directory(stream: IO[bytes]) -> tuple[int, int, int]:
    """Offset, size and number of members of the directory, whose last record ends the file."""
    end = stream.seek(0, 2) - _END.size
    require(end >= 0, "it is cut short")
    mark, disk, first_disk, here, count, size, start, comment = _unpack(_END, stream, end)
    require(mark == b"PK\x05\x06", "it is cut short, or something was appended: it does not end as a zip file does")
    require((disk, first_disk, here, comment) == (0, 0, count, 0), "its zip directory is none that torch.save writes")
    if end >= _LOCATOR_64.size:
        mark, _, end_64, _ = _unpack(_LOCATOR_64, stream, end - _LOCATOR_64.size)
        if mark == b"PK\x06\x07":
            end -= _LOCATOR_64.size + _END_64.size
            require(end_64 == end, "its zip directory is none that torch.save writes")
            mark, *_, count, size, start = _unpack(_END_64, stream, end)
            require(mark == b"PK\x06\x06", "its zip directory is none that torch.save writes")
    require(start + size <= end, "its zip directory reaches beyond the file")
    return start, size, count


def _entries(directory: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, offset, size and checksum of each member."""
    at = 0
    while at < len(directory):
        entry = _ENTRY.unpack_from(directory, at)
        flags, method, checksum, packed, size, offset = entry[3], entry[4], entry[7], entry[8], entry[9], entry[-1]
        name_end = at + _ENTRY.size + entry[10]
        extra_end = name_end + entry[11]
        require(entry[0] == b"PK\x01\x02" and extra_end <= len(directory), "its zip directory is broken")
        name, extra = directory[at + _ENTRY.size : name_end], directory[name_end:extra_end]
        size, packed, offset = _widened(extra, size, packed, offset)
        stored = method == 0 and not flags & _ENCRYPTED and packed == size
        require(stored, f"its member {name!r:.80} is compressed or encrypted, which torch.save never does")
        yield name, offset, size, checksum
        at = extra_end + entry[12]


def _widened(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those too large for 32 bits from the field of zip64."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(extra[at + 4 + i : at + 12 + i] for i in range(0, length, 8))
            return [n if n != _IN_EXTRA else struct.unpack("<Q", next(wide, b""))[0] for n in numbers]
        at += 4 + length
    return list(numbers)


def _data_start(stream: IO[bytes], name: bytes, offset: int) -> int:
    """Where the bytes of the member begin whose own header stands at `offset`."""
    mark, _, _, method, *_, name_length, extra_length = _unpack(_LOCAL, stream, offset)
    same = mark == b"PK\x03\x04" and method == 0 and stream.read(name_length) == name
    require(same, f"its member {name!r:.80} is another than its zip directory says")
    return offset + _LOCAL.size + name_length + extra_length


def _unpack(layout: struct.Struct, stream: IO[bytes], offset: int) -> tuple[Any, ...]:
    stream.seek(offset)
    return layout.unpack(stream.read(layout.size))
