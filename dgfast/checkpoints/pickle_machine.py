"""A pickle as data: its program run on plain values by a machine that can do nothing else.

A pickle is a program for a stack machine. Python's unpickler, even with a list of allowed globals, calls them with
whatever arguments the program pleases, sets attributes of what it gets back, and dies of a deeply nested key. This one
knows few opcodes and plain values only. A global is a mark on the stack, found in an exact table; what the table says
it means is all that is ever called. Nothing is imported and no attribute is set.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeVar

T = TypeVar("T")


class RefusedError(ValueError):
    """Something that an honest file does not hold; the message says it of the file: "it asks for ..."."""


@dataclass(frozen=True)
class Global:
    """A global on the stack, and what the machine's table says it means."""

    meaning: Any


def require(condition: bool, otherwise: str) -> None:
    """Raise `RefusedError(otherwise)` unless the condition holds."""
    if not condition:
        raise RefusedError(otherwise)


def of(value: Any, *types: type[T]) -> T:
    """The value, if its type is one of those and no subclass of them; else a `RefusedError`."""
    require(type(value) in types, f"it has {type(value).__name__} where {types[0].__name__} belongs")
    return value


_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NO_EFFECT = {"PROTO", "FRAME", "STOP"}


class Machine:
    """Runs pickle programs of protocol 2 and later.

    Args:
        known: the meaning of each global, by its module and name. A program may call the meanings that are callable;
            they check their arguments themselves.
        build: (object, state) gives an object its state; without it the program may give none.
        persistent: the value of a persistent id; without it the program may have none.
    """

    def __init__(
        self,
        known: Mapping[tuple[str, str], Any],
        build: Callable[[Any, Any], None] | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.known, self.build, self.persistent = known, build, persistent

    def run(self, stream: IO[bytes]) -> Any:
        """The value of the program at the stream's position; leaves the stream behind the program.

        Raises:
            RefusedError: an unknown global or opcode, a value of the wrong type.
            Exception: of many kinds, when the program is torn or makes no sense.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _NUMBERS or opcode.name in _TEXTS:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _EMPTY:
                self.stack.append(_EMPTY[opcode.name]())
            elif opcode.name not in _NO_EFFECT:
                self._step(opcode.name, argument)
        require(len(self.stack) == 1 and not self.below, "it does not end with one value")
        return self.stack[0]

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self._above_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.stack.pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(items)))
            case "APPEND":
                item = self.stack.pop()
                of(self.stack[-1], list).append(item)
            case "APPENDS":
                items = self._above_mark()
                of(self.stack[-1], list).extend(items)
            case "ADDITEMS":
                items = self._above_mark()
                of(self.stack[-1], set).update(of(item, str) for item in items)
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                of(self.stack[-1], dict)[of(key, str, int)] = value
            case "SETITEMS":
                items = self._above_mark()
                keys = [of(key, str, int) for key in items[::2]]
                of(self.stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                self.stack.append(self._find(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = self.stack.pop(), self.stack.pop()
                self.stack.append(self._find(of(module, str), of(attribute, str)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = of(self.stack.pop(), tuple), of(self.stack.pop(), Global)
                self.stack.append(function.meaning(*arguments))
            case "BUILD" if self.build:
                state = self.stack.pop()
                self.build(self.stack[-1], state)
            case "BINPERSID" if self.persistent:
                self.stack.append(self.persistent(self.stack.pop()))
            case _:
                raise RefusedError(f"it uses the pickle opcode {name}")

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _find(self, module: str, attribute: str) -> Global:
        name = f"{module}.{attribute}"[:80]
        require((module, attribute) in self.known, f"it asks for the global {name!r}")
        return Global(self.known[module, attribute])
