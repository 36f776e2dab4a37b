"""What the programs of pickles work on, and what they pay.

A few bytes can be endless work: each of a million steps may name the same large list anew. So every step is paid for
from a `Budget`, and whoever copies what a program names pays for that as well.
"""

import struct
from dataclasses import dataclass
from typing import Any, TypeVar

from dgfast import bounds

T = TypeVar("T")


class RefusedError(ValueError):
    """Something that an honest file does not hold; the message says it of the file: "it asks for ..."."""


# What a hostile or torn program can make the machine, or what is called with its values, stumble over.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """Something that a file names and dgfast does not know. Calling it or giving it a state does nothing.

    Attributes:
        name: module and name, as the file has them.
    """

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Global(Opaque):
    """A global on the stack, and what the machine's table says it means."""

    meaning: Any


def require(condition: bool, otherwise: str) -> None:
    """Raise `RefusedError(otherwise)` unless the condition holds."""
    if not condition:
        raise RefusedError(otherwise)


def of(value: Any, *types: type[T]) -> T:
    """The value, if its type is one of those and no subclass of them; else a `RefusedError`."""
    if type(value) not in types:
        raise RefusedError(f"it has {type(value).__name__} where {types[0].__name__} belongs")
    return value


def key(value: Any) -> Any:
    """The value, if a dict or a set may be asked for it; else a `RefusedError`.

    The hash of a deeply nested tuple overflows C's stack, and many large integers may share one.
    """
    of(value, *_ATOMS)
    require(type(value) is not int or value.bit_length() <= 60, "it has a key that is no reasonable number")
    require(type(value) is not str or len(value) <= 10_000, "it has a key that is no reasonable name")
    return value


def any_key(value: Any) -> Any:
    """The key, or what stands for one that is no plain value, in files that may hold anything."""
    return key(value) if type(value) in _ATOMS else Opaque(type(value).__name__)


_ATOMS: tuple[type, ...] = (str, int, float, bool, bytes, type(None))


@dataclass(slots=True)
class Budget:
    """What is left to all programs of a file.

    Attributes:
        data: bytes that may be copied into storages: no more than the file has.
        steps, text: see `bounds`.
    """

    data: int
    steps: int = bounds.PICKLE_STEPS
    text: int = bounds.PICKLE_TEXT

    def pay(self, *, steps: int = 0, text: int = 0, data: int = 0) -> None:
        """
        Raises:
            RefusedError: less than that is left.
        """
        self.steps, self.text, self.data = self.steps - steps, self.text - text, self.data - data
        if self.steps < 0:
            raise RefusedError(f"its pickle takes more than {bounds.PICKLE_STEPS:,} steps")
        if self.text < 0:
            raise RefusedError(f"its pickle holds more than {bounds.PICKLE_TEXT:,} bytes of text")
        require(self.data >= 0, "its storages are larger than the file")
