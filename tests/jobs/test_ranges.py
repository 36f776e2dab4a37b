"""Ranges are lists of numbers that take no room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgfast.ranges import Ranges

_RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=6)


@given(_RANGES, st.slices(140))
def test_ranges_are_the_list_of_their_numbers(ranges: list[tuple[int, int]], part: slice) -> None:
    numbers = [number for first, more in ranges for number in range(first, first + more + 1)]
    held = Ranges((first, first + more) for first, more in ranges)
    assert list(held) == numbers and len(held) == len(numbers)
    assert [held[k] for k in range(-len(numbers), len(numbers))] == numbers + numbers
    assert list(held[part]) == numbers[part]
    assert held.largest == max(numbers, default=-1)
    twice = [number for number in numbers if numbers.count(number) > 1]
    assert held.repeated == (min(twice) if twice else None)
    if numbers:
        assert Ranges.parse(str(held)) == held == Ranges.of(numbers)


def test_ranges_end_where_lists_end() -> None:
    with pytest.raises(IndexError):
        Ranges.parse("0-3")[4]


def test_ranges_are_never_laid_out() -> None:
    seeds = Ranges.parse("0-9999999999,5")
    assert len(seeds) == 10**10 + 1 and seeds[10**10] == 5 and seeds[-2] == 9999999999
    assert list(seeds[10**9 : 10**9 + 2]) == [10**9, 10**9 + 1] and str(seeds) == "0-9999999999,5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no numbers"), (" , ", "no numbers"), ("3-1", "ends before it begins"), ("x", "expected integers"),
        ("1.5", "expected integers"), ("-1", "expected integers"), ("0-", "expected integers"),
        ("1--2", "expected integers"), ("9" * 5000, "expected integers"), ("\u00b2", "expected integers"),
    ],
)  # fmt: skip
def test_ranges_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranges.parse(text)


def test_ranges_read_commas_spaces_and_lines() -> None:
    assert list(Ranges.parse("3, 1-2\n7\t0\n")) == [3, 1, 2, 7, 0]
