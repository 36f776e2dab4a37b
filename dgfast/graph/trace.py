"""A pure function as one graph of ATen operations, its input gradient included.

`torch.autograd.grad` is where compilers and exporters break, so it is not shown to them: `make_fx` runs the function
once on fake tensors and records what autograd would do.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dgfast.errors import UserError, one_line
from dgfast.graph import Function
from dgfast.graph.calls import CALLED, source_line
from dgfast.graph.nodes import drop_identities
from dgfast.graph.uncompiled import uncompiled

aten = torch.ops.aten
_CALLER = "dgfast.functions.flat"  # whose errors are those of the function that it calls
_MASKS = torch.bool, torch.uint8


class UntraceableError(UserError):
    """A function that does not trace.

    Attributes:
        reason: what failed, and where.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"this network does not trace: {reason}; run it without --compile")
        self.reason = reason


def trace(function: Function, example: Sequence[Tensor | None]) -> GraphModule:
    """`function` as one graph of ATen operations for the shapes, dtypes and device of `example`.

    Weights become attributes of the graph. Nothing is computed: the tensors inside are fake, so tracing a net costs
    the same at every batch size.

    Raises:
        UntraceableError: the function branches on the value of a tensor, or calls what cannot be traced;
            names where. Errors of dgfast itself, which are no matter of tracing, come as they are.
    """
    try:
        with torch.no_grad(), without_collecting(), uncompiled():
            graph = make_fx(partial(_without_reading, function), tracing_mode="fake", _allow_non_fake_inputs=True)(
                *example
            )
    except UserError:
        raise
    except Exception as error:
        if _of_dgfast(error):
            raise
        raise UntraceableError(_where(error)) from error
    drop_identities(graph)
    return graph


@contextmanager
def without_collecting() -> Iterator[None]:
    """Python's garbage collector off: graphs are objects by the million, next to none of them garbage."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _without_reading(function: Function, *arguments: Tensor | None) -> tuple[Tensor, ...]:
    with _NoReading():
        return function(*arguments)


class _NoReading(TorchDispatchMode):
    """Stops what reads a tensor's values on the host, or makes a shape of them: a graph can do neither.

    What depends on no argument may be read, for it is computed: `one_hot` reads the labels that a function holds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._calls = WeakIdKeyDictionary()  # fake tensor -> the call that makes it of tensors that are known
        self._written = dict[int, Tensor]()  # by memory: what is there is no longer what the call has made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        known = torch.Tag.nondeterministic_seeded not in func.tags and all(map(self._known, tensors))
        if func is aten.index.Tensor and all(self._known(index) for index in args[1] if index is not None):
            args, reads = (args[0], [place for index in args[1] for place in self._positions(index)]), False
        elif func is aten.index.Tensor:
            reads = any(index is not None and index.dtype in _MASKS for index in args[1])
        if reads and any(isinstance(x, FakeTensor) for x in tensors):
            if not known:
                raise RuntimeError(f"{func} depends on the values of a tensor")
            return self._computed(func, args, kwargs)
        results = func(*args, **kwargs)
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, Tensor):
                self._written[x.untyped_storage()._cdata] = x
        if known and not func._schema.is_mutable:
            several = isinstance(results, list | tuple)
            for place, result in enumerate(results if several else [results]):
                if isinstance(result, FakeTensor):
                    self._calls[result] = (func, args, kwargs), place if several else None
        return results

    def _known(self, x: Tensor) -> bool:
        return not isinstance(x, FakeTensor) or (x in self._calls and x.untyped_storage()._cdata not in self._written)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(FakeTensor, self._values, (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _values(self, x: FakeTensor) -> Tensor:
        call, place = self._calls[x]
        results = self._computed(*call)
        return results if place is None else results[place]

    def _positions(self, index: Tensor | None) -> Sequence[Tensor | None]:
        """Where a mask that is known is true, by dimension, for their number is a size; any other index as it is."""
        if index is None or index.dtype not in _MASKS:
            return [index]
        values = self._values(index) if isinstance(index, FakeTensor) else index
        with _disable_current_modes():
            return values.nonzero().unbind(1)


def _of_dgfast(error: BaseException) -> bool:
    """Whether it was raised by dgfast's own code, or by what torch and Python do for that."""
    homes = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    homes = [home for home in homes if home != __name__ and home.partition(".")[0] not in CALLED]
    return bool(homes) and homes[-1].partition(".")[0] == "dgfast" and homes[-1] != _CALLER


def _where(error: BaseException) -> str:
    """What failed, in which module, and in which line."""
    modules, step = [], error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if step.tb_frame.f_code.co_name == "forward" and isinstance(owner, nn.Module):
            modules.append(type(owner).__name__)
        step = step.tb_next
    reason = str(error).strip().splitlines() or [type(error).__name__]
    line = source_line(walk_tb(error.__traceback__))
    inside = f" (in {'.'.join(modules)})" if modules else ""
    return one_line(f"{reason[0]}{inside}" + (f", at {line}" if line else ""))
