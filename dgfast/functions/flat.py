"""A user's function as one of tensors in a row, whose arguments and results have names: see `graph.Function`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from dgfast.errors import UserError
from dgfast.functions.purity import watched
from dgfast.graph.uncompiled import uncompiled

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of a function: one tensor, a tuple of arguments, or a dict of keyword arguments."""
_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Flat:
    """A user's function of tensors, called with gradients on, whatever its caller's mode.

    Attributes:
        function: what the user wrote. example: its tensors by name. outputs: names of its results.
    """

    function: Callable[..., Any]
    example: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    _arguments: TreeSpec
    _results: TreeSpec
    own_weights: ClassVar[bool] = True  # see `graph.cache.lowered`

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.example)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Its results, which carry no gradient."""
        leaves = [
            x.detach().requires_grad_(e.requires_grad) for x, e in zip(tensors, self.example.values(), strict=True)
        ]
        call = inspect.BoundArguments(_signature(self.function), tree_unflatten(leaves, self._arguments))
        with torch.enable_grad(), uncompiled():
            results, _ = tree_flatten(self.function(*call.args, **call.kwargs))
        return tuple(x.detach() for x in results)

    def tensors(self, *arguments: Any, **keywords: Any) -> list[Tensor]:
        """Those of a call, in a row.

        Raises:
            UserError: it differs from the example in anything but values.
        """
        named, spec = _flattened(self.function, arguments, keywords)
        if spec != self._arguments:
            raise UserError(f"arguments {', '.join(named)}, not {', '.join(self.inputs)} as in the example")
        for (name, x), e in zip(named.items(), self.example.values(), strict=True):
            if (x.shape, x.dtype, x.device) != (e.shape, e.dtype, e.device):
                raise UserError(f"{name} is {_form(x)}, not {_form(e)} as in the example: build it for that form too")
        return list(named.values())

    def structured(self, results: Sequence[Tensor]) -> Any:
        """Results in a row as the function returns them."""
        return tree_unflatten(results, self._results)


def flat(function: Callable[..., Any], example: Example) -> Flat:
    """`function`, called twice on the example: it must be pure.

    Raises:
        UserError: it is not, or arguments or results are no tensors; an error of the function comes as it is.
    """
    if not callable(function):
        raise UserError(f"an object of type {type(function).__name__}: give a function of tensors")
    arguments, keywords = call_of(example)
    named, spec = _flattened(function, arguments, keywords)
    if not named:
        raise UserError("the function takes no tensor: give an example of its arguments")
    if len({x.device for x in named.values()}) > 1:
        raise UserError(
            f"arguments on {', '.join(sorted({str(x.device) for x in named.values()}))}: put all on one device"
        )
    example_of = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in named.items()}
    call = inspect.BoundArguments(_signature(function), tree_unflatten(list(example_of.values()), spec))
    with uncompiled():
        results = watched(lambda: function(*call.args, **call.kwargs), example_of)
    leaves, result_spec = tree_flatten_with_path(results)
    outputs = [_name(path, "output") for path, _ in leaves]
    outputs = [f"{name}_out" if name in named else name for name in outputs]
    for name, (_, x) in zip(outputs, leaves, strict=True):
        if not isinstance(x, Tensor):
            raise UserError(f"the function returns {name}, a {type(x).__name__}: let it return tensors")
        if x.is_complex() or not x.numel():
            raise UserError(f"the function returns {name}, {_form(x)}: let it return real tensors with elements")
    if not outputs or len(set(outputs)) < len(outputs):
        raise UserError(f"the function returns {', '.join(outputs) or 'nothing'}: results need names of their own")
    return Flat(function, example_of, tuple(outputs), spec, result_spec)


def call_of(example: Example) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of an example."""
    if isinstance(example, Mapping):
        return (), example
    if not isinstance(example, Tensor | Sequence):
        raise UserError(f"the example is a {type(example).__name__}: give a tensor, a tuple of arguments, or a dict")
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # a function of C
        return inspect.signature(lambda *input: None)


def _flattened(
    function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[dict[str, Tensor], TreeSpec]:
    """The tensors of a call by name, and how to put them together again."""
    try:
        bound = _signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise UserError(f"the arguments do not fit the function: {error}") from error
    leaves, spec = tree_flatten_with_path(dict(bound.arguments))
    named = {_name(path, "input"): x for path, x in leaves}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is a {type(x).__name__}: give a tensor, or bind it with functools.partial")
        if x.dtype not in _DTYPES or not x.numel() or x.layout != torch.strided or x.is_meta:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UserError(f"{name} is {_form(x)}: give a dense tensor with elements, of {kinds}")
    return named, spec


def _name(path: Sequence[Any], kind: str) -> str:
    """ "batch.positions" for a tensor in a dict, "output_0" for the first of a tuple."""
    steps = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
    name = ".".join(steps)
    return name if name and not name[0].isdigit() else f"{kind}_{name}" if name else kind


def _form(x: Tensor) -> str:
    kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return kind if x.device.type == "cpu" else f"{kind} on {x.device}"
