"""A pickle as data: its program run on plain values by a machine that can do nothing else.

A pickle is a program for a stack machine. Python's unpickler, even with a list of allowed globals, calls them with
whatever arguments the program pleases, sets attributes of what it gets back, and dies of a deeply nested key. This one
knows few opcodes and plain values only. A global is a mark on the stack, found in an exact table; what the table says
it means is all that is ever called. Nothing is imported and no attribute is set.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

from dgfast.checkpoints.pickle_values import Budget, Global, Opaque, RefusedError, any_key, key, of, require

_COSTLY = 8  # steps that a set, a name or a call costs beside its own: each takes more time or memory than others


class Machine:
    """Runs pickle programs of protocol 2 and later.

    Args:
        known: the meaning of each global, by its module and name. A program may call the meanings that are callable;
            they check their arguments themselves.
        budget: shared by all programs of a file.
        build: (object, state) gives an object its state; without it the program may give none.
        persistent: the value of a persistent id; without it the program may have none.
        unknown: (module, name) -> what stands for a global beyond `known`; without it the program may name none.
    """

    def __init__(
        self,
        known: Mapping[tuple[str, str], Any],
        budget: Budget,
        build: Callable[[Any, Any], None] | None = None,
        persistent: Callable[[Any], Any] | None = None,
        unknown: Callable[[str, str], Opaque] | None = None,
    ) -> None:
        self.known, self.budget = known, budget
        self.build, self.persistent, self.unknown = build, persistent, unknown
        self.key = any_key if unknown else key

    def run(self, stream: IO[bytes]) -> Any:
        """The value of the program at the stream's position; leaves the stream behind the program.

        Raises:
            RefusedError: an unknown global or opcode, a value of the wrong type, more than the budget has.
            Exception: of `MALFORMED`, when the program is torn or makes no sense.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}
        self.stream, start = stream, stream.tell()
        self.end = stream.seek(0, 2)
        stream.seek(start)
        budget = self.budget
        while (code := stream.read(1)) != b".":
            budget.steps -= 1
            if code not in _STEPS or budget.steps < 0:
                self._refuse(code)
            _STEPS[code](self)
        require(len(self.stack) == 1 and not self.below, "it does not end with one value")
        return self.stack[0]

    def _refuse(self, code: bytes) -> None:
        self.budget.pay()
        if not code:
            raise EOFError("it is cut short")
        opcode = pickletools.code2op.get(code.decode("latin-1"))  # type: ignore[attr-defined]
        raise RefusedError(f"it uses the pickle opcode {opcode.name if opcode else code.hex()}")

    # What stands behind an opcode -------------------------------------------------------------------------------------
    def read_number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.stream.read(layout.size))[0]

    def read_bytes(self, length: struct.Struct) -> bytes:
        count = self.read_number(length)
        if count > self.end - self.stream.tell():
            raise EOFError("it is cut short")
        return self.stream.read(count)

    def read_text(self, length: struct.Struct, errors: str = "surrogatepass") -> str:
        content = self.read_bytes(length)
        self.budget.pay(text=len(content))
        return content.decode("utf-8", errors)

    def read_line(self) -> str:
        content = self.stream.readline(256)
        require(content.endswith(b"\n"), "it asks for a global without a proper name")
        return content[:-1].decode("utf-8")

    # Steps ------------------------------------------------------------------------------------------------------------
    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("too few values on the stack")
        del self.stack[-count:]
        return items

    def new_set(self) -> set[Any]:
        self.budget.pay(steps=_COSTLY)
        return set()

    def extend(self, items: Any) -> None:
        if not self._ignores(self.stack[-1]):
            of(self.stack[-1], list).extend(items)

    def add_items(self, items: Any) -> None:
        if not self._ignores(self.stack[-1]):
            of(self.stack[-1], set).update(map(self.key, items))

    def set_items(self, items: Any) -> None:
        if not self._ignores(self.stack[-1]):
            keys = [self.key(item) for item in items[::2]]
            of(self.stack[-1], dict).update(zip(keys, items[1::2], strict=True))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> Opaque:
        place = of(module, str), of(name, str)
        self.budget.pay(steps=_COSTLY)
        if place in self.known:
            return Global(".".join(place), self.known[place])
        if self.unknown is None:
            raise RefusedError(f"it asks for the global {'.'.join(place)[:80]!r}")
        return self.unknown(*place)

    def call(self) -> Any:
        function, arguments = self.last(2)
        if self._ignores(function):
            return function
        self.budget.pay(steps=_COSTLY)
        return of(function, Global).meaning(*of(arguments, tuple))

    def give_state(self) -> None:
        if self.build is None:
            return self._refuse(b"b")
        state = self.stack.pop()
        if not self._ignores(self.stack[-1]):
            self.build(self.stack[-1], state)

    def persistent_value(self) -> Any:
        return self.persistent(self.stack.pop()) if self.persistent else self._refuse(b"Q")

    def _ignores(self, target: Any) -> bool:
        """Whether nothing happens to that target, whatever a program does with it."""
        return type(target) is Opaque


def _pushing(value: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def step(machine: Machine) -> None:
        item = value(machine)  # which may go back to the stack below a mark
        machine.stack.append(item)

    return step


_U1, _U2, _U4, _U8, _I4, _F8 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": lambda machine: machine.read_number(_U1),  # the protocol's number
    b"\x95": lambda machine: machine.read_number(_U8),  # the length of a frame
    b"N": _pushing(lambda _: None),
    b"\x88": _pushing(lambda _: True),
    b"\x89": _pushing(lambda _: False),
    b"J": _pushing(lambda machine: machine.read_number(_I4)),
    b"K": _pushing(lambda machine: machine.read_number(_U1)),
    b"M": _pushing(lambda machine: machine.read_number(_U2)),
    b"G": _pushing(lambda machine: machine.read_number(_F8)),
    b"\x8a": _pushing(lambda machine: int.from_bytes(machine.read_bytes(_U1), "little", signed=True)),
    b"X": _pushing(lambda machine: machine.read_text(_U4)),
    b"\x8c": _pushing(lambda machine: machine.read_text(_U1)),
    b"\x8d": _pushing(lambda machine: machine.read_text(_U8)),
    b"U": _pushing(lambda machine: machine.read_text(_U1, "surrogateescape")),  # Python 2's, of letters or bytes
    b"T": _pushing(lambda machine: machine.read_text(_U4, "surrogateescape")),
    b"C": _pushing(lambda machine: machine.read_bytes(_U1)),
    b"B": _pushing(lambda machine: machine.read_bytes(_U4)),
    b"\x8e": _pushing(lambda machine: machine.read_bytes(_U8)),
    b"\x96": _pushing(lambda machine: machine.read_bytes(_U8)),
    b"]": _pushing(lambda _: []),
    b"}": _pushing(lambda _: {}),
    b"\x8f": _pushing(Machine.new_set),
    b"(": Machine.mark,
    b")": _pushing(lambda _: ()),
    b"t": _pushing(lambda machine: tuple(machine.above_mark())),
    b"\x85": _pushing(lambda machine: machine.last(1)),
    b"\x86": _pushing(lambda machine: machine.last(2)),
    b"\x87": _pushing(lambda machine: machine.last(3)),
    b"\x91": _pushing(lambda machine: set(map(machine.key, machine.above_mark()))),
    b"a": lambda machine: machine.extend(machine.last(1)),
    b"e": lambda machine: machine.extend(machine.above_mark()),
    b"\x90": lambda machine: machine.add_items(machine.above_mark()),
    b"s": lambda machine: machine.set_items(machine.last(2)),
    b"u": lambda machine: machine.set_items(machine.above_mark()),
    b"\x94": lambda machine: machine.memoize(len(machine.memo)),
    b"q": lambda machine: machine.memoize(machine.read_number(_U1)),
    b"r": lambda machine: machine.memoize(machine.read_number(_U4)),
    b"h": _pushing(lambda machine: machine.memo[machine.read_number(_U1)]),
    b"j": _pushing(lambda machine: machine.memo[machine.read_number(_U4)]),
    b"c": _pushing(lambda machine: machine.find(machine.read_line(), machine.read_line())),
    b"\x93": _pushing(lambda machine: machine.find(*machine.last(2))),
    b"R": _pushing(Machine.call),
    b"\x81": _pushing(Machine.call),
    b"b": Machine.give_state,
    b"Q": _pushing(Machine.persistent_value),
}
