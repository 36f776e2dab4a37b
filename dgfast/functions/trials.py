"""Inputs other than the example that a function is tried with, and what it returns there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.functions.flat import Flat

_LEAST = 2  # trials that have to be left, beside the example
_ROUNDINGS = 10.0  # an error counts only if it is larger than what rounding the inputs does, so many times


@dataclass(frozen=True)
class Trial:
    """One call.

    Attributes:
        inputs, results: tensors by name. roundings: of each result, the size [] of what rounding the inputs does to it.
    """

    name: str
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]
    roundings: Mapping[str, Tensor]

    def least(self, tolerance: float) -> dict[str, Tensor]:
        """Sizes of which an error is a share where the results are smaller, see `agreement.relative_error`."""
        return {name: _ROUNDINGS * size / tolerance for name, size in self.roundings.items()}


def trials(function: Flat, others: Sequence[Mapping[str, Tensor]], sizes: Mapping[str, int | None]) -> list[Trial]:
    """The example, inputs near it and far from it, and those of the caller.

    Numbers are drawn around those of the example; whole numbers and truths are drawn among its own, and so are never
    an atom that there is none of. Trials in which the function fails, or returns what is no number, are left out.

    Args:
        others: further inputs, by name. sizes: by name, the first size of the inputs that have another one than in
            the example.

    Raises:
        UserError: too few are left.
    """
    example = {name: resized(x, sizes.get(name)) for name, x in function.example.items()}
    generator = torch.Generator().manual_seed(0)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "near": lambda x: _around(x, 0.05, generator),
        "around": lambda x: _around(x, 0.4, generator),
        "far": lambda x: 2 * _around(x, 0.1, generator) if x.is_floating_point() else x,
        "others": lambda x: _around(x, 0.2, generator) if x.is_floating_point() else _drawn(x, generator),
    }
    drawn = [(name, {key: way(x) for key, x in example.items()}) for name, way in ways.items()]
    own = [(f"own {number}", inputs) for number, inputs in zip(count(1), others)]
    made = [_trial(function, name, inputs, generator) for name, inputs in [("example", example), *drawn]]
    kept = [trial for trial in made if trial is not None]
    kept += [_required(function, name, inputs, generator) for name, inputs in own]
    if len(kept) < _LEAST + 1:
        raise UserError(
            "the function fails, or returns what is no number, on inputs near the example: give others=[...], two more "
            "examples that it can be compared on"
        )
    return kept


def resized(x: Tensor, size: int | None) -> Tensor:
    """The tensor with as many samples, its own again and again."""
    return x if size is None else x.detach()[torch.arange(size, device=x.device) % len(x)]


def _required(function: Flat, name: str, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Trial:
    trial = _trial(function, name, inputs, generator)
    if trial is None:
        raise UserError(f"{name} of others: the function fails there, or returns what is no number")
    return trial


def _trial(function: Flat, name: str, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Trial | None:
    try:
        results = function(*inputs.values())
        moved = function(*(_rounded(x, generator) for x in inputs.values()))
    except (RuntimeError, IndexError, ValueError):  # inputs that the function is not made for
        return None
    if not all(bool(x.isfinite().all()) for x in (*results, *moved)):
        return None
    sizes = [(a.double() - b.double()).abs().max().cpu() for a, b in zip(results, moved, strict=True)]
    named = (dict(zip(function.outputs, values, strict=True)) for values in (results, sizes))
    return Trial(name, inputs, *named)


def _around(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each number changed by at most this share of itself; noise where all are 0. Whole numbers stay."""
    if not x.is_floating_point():
        return x
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
    return (x.detach() if bool(x.any()) else torch.ones_like(x)) * (1 + share * (2 * noise - 1))


def _rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    return _around(x, torch.finfo(x.dtype).eps, generator) if x.is_floating_point() and bool(x.any()) else x


def _drawn(x: Tensor, generator: torch.Generator) -> Tensor:
    values = x.reshape(-1)
    return values[torch.randint(len(values), (len(values),), generator=generator).to(x.device)].reshape(x.shape)
