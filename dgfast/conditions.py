"""Extra conditions: tensors that are handed through to a denoiser of your own, by name.

Such a denoiser declares them in an attribute, `conditions: Mapping[str, tuple[int, ...]]`, each a name and one sample's
shape, and is called as `net(x, sigma, class_labels, **conditions)`. Inside of a pure function they are further inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.guidance import Guidance
from dgfast.guidance.declaration import off_values

Shapes = Mapping[str, tuple[int, ...]]
_TAKEN = {"x", "sigma", "sigma_next", "class_labels", "noise", "log_least", "log_most", "denoised_last", "sigma_last"}
_RESULTS = {"x_next", "denoised", "log_ratio", "shift", "variance", "gradient"}


def declared(net: object) -> dict[str, tuple[int, ...]]:
    """The conditions of a network, by name: one sample's shape.

    Raises:
        UserError: a name that no argument can have, a shape that none has, or no shapes by name.
    """
    own = getattr(net, "conditions", None) or {}
    if not isinstance(own, Mapping) or not all(isinstance(shape, Sequence) for shape in own.values()):
        raise UserError(f"conditions of the network: {own!r:.80} are no shapes by name, such as {{'text': (5,)}}")
    shapes = {name: tuple(shape) for name, shape in own.items()}
    for name, shape in shapes.items():
        if not str(name).isidentifier() or name in _TAKEN | _RESULTS | off_values().keys():
            raise UserError(f"conditions of the network: {name!r:.80} is no name for one")
        if not all(type(extent) is int and extent > 0 for extent in shape):
            raise UserError(f"condition {name}: {shape} is no shape of one sample")
    return shapes


def given(shapes: Shapes, values: Mapping[str, Tensor] | None, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """The conditions of `count` samples in the order of `shapes`, float32 [count, *shape] each.

    Args:
        values: by name, one row a sample, [count, *shape]; or the same for all, [*shape] or [1, *shape].

    Raises:
        UserError: one that is missing, superfluous, misshapen, no real numbers or NaN.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise UserError(f"conditions must be tensors by name, not a {type(values).__name__}")
    if strange := [name for name in values if name not in shapes]:
        raise UserError(f"the network has no condition {strange[0]!r:.80}; it has {', '.join(shapes) or 'none'}")
    rows = []
    for name, shape in shapes.items():
        if values.get(name) is None:
            raise UserError(f"condition {name} is missing: give conditions={{{name!r}: tensor of {[count, *shape]}}}")
        value = _numbers(name, values[name])
        if tuple(value.shape) not in (shape, (1, *shape), (count, *shape)):
            raise UserError(
                f"condition {name} has the shape {[*value.shape]}; give {[count, *shape]}, or {[*shape]} for all images"
            )
        if bool(value.isnan().any()):
            raise UserError(f"condition {name} has NaN in it: look at where it comes from")
        rows.append(value.to(device, torch.float32).expand(count, *shape))
    return tuple(rows)


def _numbers(name: str, value: object) -> Tensor:
    """
    Raises:
        UserError: it is no tensor of real numbers.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"condition {name} is a {type(value).__name__}, not a tensor of numbers") from error
    if tensor.is_complex():
        raise UserError(f"condition {name} has complex numbers: give their real and imaginary parts side by side")
    return tensor


class Conditioned:
    """A denoiser with its conditions: called without them, as every guidance calls it."""

    def __init__(self, net: Callable[..., Tensor], conditions: Mapping[str, Tensor]) -> None:
        self._net, self._conditions = net, conditions

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return self._net(x, sigma, class_labels, **self._conditions)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a network has
        return getattr(self._net, name)

    @property
    def with_variance(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """That of the denoiser; None where it has none."""
        own = getattr(self._net, "with_variance", None)
        return None if own is None else lambda *arguments: own(*arguments, **self._conditions)


def conditioned(
    make: Callable[..., Callable[..., tuple[Tensor, ...]]], net: Callable[..., Tensor], guidances: Sequence[Guidance],
    names: tuple[str, ...], *arguments: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`make(net, guidances)` called with all arguments but the last, which are the conditions of these names.

    Every network among them that declares conditions gets its own: of the guidances those by other denoisers. What
    looks at images alone, a classifier or a discriminator, sees none.
    """
    state, values = arguments[: -len(names)], dict(zip(names, arguments[-len(names) :], strict=True))

    def bound(one: Any) -> Any:  # noqa: ANN401 - any value of a guidance
        own = {name: value for name in declared(one) if (value := values[name]) is not None}
        return Conditioned(one, own) if own else one

    return make(bound(net), [_with(guidance, bound) for guidance in guidances])(*state)


def _with(guidance: Guidance, bound: Callable[[Any], Any]) -> Guidance:
    """The guidance with its networks bound."""
    if not is_dataclass(guidance):
        return guidance
    values = {field.name: getattr(guidance, field.name) for field in fields(guidance) if field.init}
    changed = {name: bound(value) for name, value in values.items() if bound(value) is not value}
    return replace(guidance, **changed) if changed else guidance


def require_same(own: Shapes, others: Sequence[object]) -> None:
    """
    Raises:
        UserError: another network has a condition that the denoiser does not have, or of another shape.
    """
    for other in others:
        for name, shape in declared(other).items():
            if own.get(name) != shape:
                raise UserError(f"the reference network's condition {name} {list(shape)} is none of the denoiser's")
