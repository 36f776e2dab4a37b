"""The table of operations, and how a file enters some."""

from collections.abc import Callable
from typing import Any

from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.values import Batch, Value

Entry = Callable[..., Any]
"""(graph, out, *arguments, **keywords) -> Value or tuple; `out` is the shape and numpy type that torch says."""

TABLE: dict[Any, Entry] = {}


class NoFormError(Exception):
    """An operation, or these options of one, that the table cannot write: users hear of it from `writer`."""


class Out(tuple[Any, Any, Any]):
    """Shape and type of an operation's (first) result, and of several results the numbers of those that are read."""

    shape = property(lambda self: self[0])
    dtype = property(lambda self: self[1])
    read = property(lambda self: self[2])


def entry(*targets: Any) -> Callable[[Entry], Entry]:
    def register(function: Entry) -> Entry:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


def number(g: OnnxGraph, x: Any, dtype: Any) -> Value:
    """A tensor or a plain number as a value of this type."""
    if isinstance(x, Batch):
        raise NoFormError("a number that depends on the batch: export it for one batch size")
    return g.cast(x, dtype) if isinstance(x, Value) else g.constant(x, dtype)
