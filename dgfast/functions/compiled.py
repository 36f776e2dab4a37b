"""A user's function compiled, and compared with itself before anybody gets it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from dgfast.errors import UserError
from dgfast.functions.flat import Example, Flat, call_of, flat
from dgfast.functions.trials import Trial, trials
from dgfast.graph.agreement import relative_error
from dgfast.graph.trace import UntraceableError
from dgfast.runtimes import RUNTIMES

DOUBLE = 1e-9
"""Most that a result in double precision may be off."""
_ALLOWED = "compiled", "package"  # the others compute in single precision, and take the first size for the batch


def compile(
    function: Callable[..., Any], example: Example, *, others: Sequence[Example] = (), runtime: str = "compiled"
) -> Callable[..., Any]:
    """A pure function of tensors, which may take gradients inside, compiled for the example's shapes, types and device.

    It agrees with `function` on the example and on inputs around it, or there is an error. The result is called as
    `function` is and returns what that returns; no gradient leads back through it. Weights are copied.

    Args:
        function: parameters of modules may be closed over, or bound by a partial. Arguments and results are tensors, or
            tuples, lists and dicts of them.
        example: a tensor, a tuple of arguments, or a dict of keyword arguments.
        others: further examples to compare on.
        runtime: "compiled", or "package": AOTInductor's code, which takes half a minute and is quicker where a
            function has many small operations.

    Raises:
        UserError: the function is not pure, does not trace or comes out otherwise; or there is no C++ compiler. The
            result raises it for arguments of other shapes, types or devices.
    """
    if runtime not in _ALLOWED:
        raise UserError(f"runtime {runtime!r}: a function is compiled by {' or '.join(_ALLOWED)}")
    of_tensors, way = flat(function, example), RUNTIMES[runtime]
    try:
        whole = way.whole(of_tensors, list(of_tensors.example.values()))
    except UntraceableError as error:
        raise UserError(untraceable(error)) from error
    device = next(iter(of_tensors.example.values())).device

    def built(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, enabled=False):  # the trace has what was cast already
            return whole(*tensors)

    for trial in trials(of_tensors, further(of_tensors, others), {}):
        _require_agreement(of_tensors, built, trial, DOUBLE if in_double(of_tensors) else way.tolerance)

    def compiled(*arguments: Any, **keywords: Any) -> Any:
        tensors = of_tensors.tensors(*arguments, **keywords)
        if any(isinstance(x, FakeTensor) for x in tensors):
            raise UserError("a compiled function cannot be traced again: give the function that it was made of")
        return of_tensors.structured(built(*tensors))

    return compiled


def in_double(function: Flat) -> bool:
    """Whether no number of it is in single precision."""
    kinds = {x.dtype for x in function.example.values() if x.is_floating_point()}
    return kinds == {torch.float64}


def untraceable(error: UntraceableError) -> str:
    """What to say of a function that does not trace."""
    return (
        f"the function does not trace: {error.reason}; it must compute with tensors alone: torch.where for a branch, "
        "no .item(), no numpy"
    )


def further(function: Flat, others: Sequence[Example]) -> list[dict[str, Tensor]]:
    """Further examples, each by the names of the function's inputs.

    Raises:
        UserError: they are no list, or one of them does not fit the function as the example does.
    """
    if not isinstance(others, list | tuple):
        raise UserError(f"others is a {type(others).__name__}: give a list of further examples, others=[...]")
    made = []
    for k, example in enumerate(others):
        try:
            arguments, keywords = call_of(example)
            made.append(dict(zip(function.inputs, function.tensors(*arguments, **keywords), strict=True)))
        except UserError as error:
            raise UserError(f"others[{k}]: {error.message}") from error
    return made


def _require_agreement(function: Flat, built: Callable[..., Any], trial: Trial, tolerance: float) -> None:
    results, least = built(*trial.inputs.values()), trial.least(tolerance)
    for name, result in zip(function.outputs, results, strict=True):
        error = relative_error(result, trial.results[name], least[name])
        if not error <= tolerance:
            raise UserError(
                f"compiled, {name} differs from the function's by {error:.1e} of its largest value (allowed "
                f"{tolerance:.0e}) on {trial.name}: it depends on more than its arguments, or on their last digits"
            )
