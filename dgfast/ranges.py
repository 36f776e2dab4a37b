"""Whole numbers as ranges: fifty thousand seeds take the room of two numbers."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import overload


class Ranges(Sequence[int]):
    """Numbers from 0 on, in the order given, held as inclusive ranges.

    `str` writes them as `parse` reads them: 0-63,100.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """
        Args:
            ranges: first and last number of each; one that continues the range before it is joined to it.
        """
        joined: list[tuple[int, int]] = []
        for first, last in ranges:
            if joined and joined[-1][1] + 1 == first:
                joined[-1] = joined[-1][0], last
            else:
                joined.append((first, last))
        self._ranges = joined
        self._ends = list(accumulate(last - first + 1 for first, last in joined))

    @classmethod
    def parse(cls, text: str) -> "Ranges":
        """The numbers of a text such as 0-63,100; commas, spaces and line ends part them.

        Raises:
            ValueError: what is wrong with it.
        """
        ranges = []
        for part in text.replace(",", " ").split():
            first, dash, last = part.partition("-")
            digits = first.isdecimal() and (last.isdecimal() if dash else not last)
            if not digits or len(first) > 20 or len(last) > 20:  # Python refuses to read numbers of 4,300 digits
                raise ValueError(f"{part[:40]!r}: expected integers and ranges such as 0-63,100")
            if dash and int(last) < int(first):
                raise ValueError(f"the range {part} ends before it begins")
            ranges.append((int(first), int(last or first)))
        if not ranges:
            raise ValueError("no numbers: expected integers and ranges such as 0-63,100")
        return cls(ranges)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Ranges":
        """These numbers, in this order."""
        return cls((number, number) for number in numbers)

    @classmethod
    def joined(cls, parts: "Iterable[Ranges]") -> "Ranges":
        """All numbers of the parts, one part after the other."""
        return cls(pair for part in parts for pair in part._ranges)

    @property
    def largest(self) -> int:
        """The largest number; -1 without any."""
        return max((last for _, last in self._ranges), default=-1)

    @property
    def repeated(self) -> int | None:
        """The smallest number that stands in two ranges, or None."""
        by_first = sorted(self._ranges)
        return next((later[0] for before, later in pairwise(by_first) if later[0] <= before[1]), None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> "Ranges": ...
    def __getitem__(self, index: int | slice) -> "int | Ranges":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._between(start, stop) if step == 1 else Ranges.of(self[k] for k in range(start, stop, step))
        position = range(len(self))[index]  # counts from the end, and raises, as lists do
        which = bisect_right(self._ends, position)
        return self._ranges[which][1] - (self._ends[which] - 1 - position)

    def _between(self, start: int, stop: int) -> "Ranges":
        parts = []
        which = bisect_right(self._ends, start)
        while start < stop:
            last = self._ranges[which][1]
            end = min(stop, self._ends[which])
            parts.append((last - (self._ends[which] - 1 - start), last - (self._ends[which] - end)))
            start, which = end, which + 1
        return Ranges(parts)

    def __iter__(self) -> Iterator[int]:
        for first, last in self._ranges:
            yield from range(first, last + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(tuple(self._ranges))

    def __str__(self) -> str:
        return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in self._ranges)

    def __repr__(self) -> str:
        return f"Ranges({str(self)!r})"
