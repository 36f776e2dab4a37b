"""Whether a function is pure: it draws nothing, writes to nothing that it has not made, and keeps nothing."""

from collections.abc import Callable, Mapping
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgfast.errors import UserError, one_line
from dgfast.graph.agreement import relative_error
from dgfast.graph.calls import modules_entered, source_line
from dgfast.graph.calls import named as named_module

_SAME = 1e-4  # the most that two calls may differ: sums over indices have no fixed order on a GPU


class ImpureError(UserError):
    """A function that is not pure: what it does, and where."""


def watched(call: Callable[[], Any], arguments: Mapping[str, Tensor]) -> Any:
    """What the call returns; it is made twice.

    Raises:
        ImpureError: it draws random numbers, writes to an argument or to a module, fills `.grad`, or returns otherwise
            the second time.
    """
    with modules_entered() as entered, _Watch(arguments, entered) as watch, torch.enable_grad():
        first = call()
    watch.require_no_gradients_kept()
    with torch.enable_grad():
        second = call()
    leaves = [torch.utils._pytree.tree_leaves(results) for results in (first, second)]
    for a, b in zip(*leaves, strict=True):
        if isinstance(a, Tensor) and not _same(a, b):
            raise ImpureError(
                "the function returns other values when it is called again with the same arguments: it keeps state, or "
                "draws numbers outside of torch; pass in what changes"
            )
    return first


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    finite = a.isfinite()
    a, b = (torch.where(finite, x.detach(), 0) for x in (a, b))
    a, b = (torch.view_as_real(x) if x.is_complex() else x.double() for x in (a, b))
    return not a.numel() or relative_error(b, a, torch.zeros(())) <= _SAME or bool((a == b).all())


class _Watch(TorchDispatchMode):
    """Sees every operation of a call, its backward passes included."""

    def __init__(self, arguments: Mapping[str, Tensor], entered: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._entered, self._made = entered, set[int]()
        self._names = {_memory(x): name for name, x in arguments.items()}
        self._gradients: dict[nn.Parameter, tuple[str, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = func._schema.arguments
        given = {a.name: a.default_value for a in named if a.has_default_value()}
        given |= dict(zip((a.name for a in named), args, strict=False)) | (kwargs or {})
        for module in self._entered[-1:]:
            for name, parameter in module.named_parameters(recurse=False):
                self._gradients.setdefault(parameter, (f"{type(module).__name__}.{name}", parameter.grad))
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(given):
            raise ImpureError(f"the function draws random numbers{self._place()}: {self._remedy('pass them in')}")
        if "batch_norm" in func.name() and given.get("training") and given.get("running_mean") is not None:
            raise ImpureError(f"the function updates running statistics{self._place()}: {self._remedy('freeze them')}")
        for argument in named:
            x = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, Tensor):
                self._require_own(x)
        results = func(*args, **(kwargs or {}))
        read = {_memory(x) for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, Tensor)} - self._made
        made = {_memory(x) for x in torch.utils._pytree.tree_leaves(results) if isinstance(x, Tensor)}
        self._made |= made - read
        return results

    def require_no_gradients_kept(self) -> None:
        """
        Raises:
            ImpureError: `.grad` of a parameter was filled.
        """
        for parameter, (name, gradient) in self._gradients.items():
            if parameter.grad is not gradient:
                raise ImpureError(f"the function fills .grad of {name}: call torch.autograd.grad, not backward()")

    def _require_own(self, x: Tensor) -> None:
        memory = _memory(x)
        if memory in self._made:
            return
        if memory in self._names:
            raise ImpureError(
                f"the function writes to its argument {self._names[memory]}{self._place()}: make a new tensor instead"
            )
        held = [
            f"{type(module).__name__}'s {name}"
            for module in reversed(self._entered)
            for name, held in [*module.named_buffers(), *module.named_parameters()]
            if _memory(held) == memory
        ]
        what = held[0] if held else "a tensor that it has not made"
        raise ImpureError(f"the function writes to {what}{self._place()}: {self._remedy('make a new tensor instead')}")

    def _place(self) -> str:
        line, module = source_line(reversed(list(walk_stack(None)))), named_module(self._entered)
        return one_line((f" in {module}" if module else "") + (f" at {line}" if line else ""), 200).join((" ", ""))

    def _remedy(self, otherwise: str) -> str:
        trained = self._entered and self._entered[-1].training
        return "call .eval() on the network, which is in training mode" if trained else otherwise


def _draws(given: Mapping[str, Any]) -> bool:
    """Whether it does with these options: what drops nothing draws nothing."""
    return not (given.get("dropout_p") == 0 or given.get("dropout") == 0 or given.get("train") is False)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata
