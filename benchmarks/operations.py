"""The operations of dgfast/ops.py as they stand in the networks, with and without gradient, and ways to run them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import LOW_PRECISION_SLACK, PRECISIONS, Call, check, relative_error
from dgfast import ops

Arguments = dict[str, Any]
Function = Callable[..., Any]

_GROUPS, _EPS, _TOLERANCE = 32, 1e-5, 2e-5
_NORM_SHAPE = {"cpu": (2, 256, 32, 32), "cuda": (512, 256, 32, 32)}  # the layers of edm-cifar10 that move most
_SMALL_NORM_SHAPE = (2, 32, 8, 8)
_HEADS_SHAPE = (64, 2, 1024, 64)  # batch, heads, tokens, channels: the layers of its discriminator that compute most
_SMALL_HEADS_SHAPE = (2, 2, 20, 16)
_PRECISIONS = {"cpu": ("float32",), "cuda": ("bf16", "float32")}


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
        reference: its definition in plain torch. kernel: the same function, which runs a Triton kernel if told to.
        arguments: draws arguments for both, the same ones at every call.
    """

    reference: Function
    kernel: Function
    arguments: Callable[[], Arguments]


@dataclass(frozen=True)
class KernelCase:
    """An operation and the way to run it."""

    name: str
    operation: Operation
    implementation: str

    def call(self) -> Call:
        """The operation on its arguments, ready to be timed."""
        return IMPLEMENTATIONS[self.implementation](self.operation)


def cases(device: torch.device, small: bool = False) -> Iterator[KernelCase]:
    """Every operation in every way that this device has; `small` for trying the benchmarks themselves."""
    on_cuda = device.type == "cuda"
    for name, suffix, operation in _operations(device, small):
        libraries = _LIBRARIES if on_cuda and name.startswith("attention") else {}
        for implementation in ("eager", "compiled", *(["triton"] if on_cuda else []), *libraries):
            yield KernelCase(f"{name}-{implementation}{suffix}", operation, implementation)


def gate(case: KernelCase, results: Sequence[Tensor]) -> tuple[float, float]:
    """Error against the reference in float64, and the largest allowed: twice plain torch's own if that is more.

    Raises:
        WrongResultError: the error is larger.
    """
    reference, arguments = case.operation.reference, case.operation.arguments()
    truth = tensors(reference(**in_float64(arguments)))
    plain = relative_error(tensors(reference(**arguments)), truth)
    error, allowed = relative_error(results, truth), max(_TOLERANCE, LOW_PRECISION_SLACK * plain)
    check(f"kernel {case.name}", "the reference in float64", error, allowed)
    return error, allowed


def device_seconds(call: Call) -> float:
    """Time on a GPU alone: a kernel of microseconds is shorter than the wait for it."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def in_float64(arguments: Arguments) -> Arguments:
    """The same numbers in float64."""
    return {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}


def bytes_moved(arguments: Arguments, results: Sequence[Tensor]) -> int:
    """The least that must move: every argument read once, every result written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors(arguments), *results))


def tensors(values: Any) -> list[Tensor]:
    """The tensors among the arguments or the results of an operation."""
    listed = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else [values]
    return [value for value in listed if isinstance(value, Tensor)]


# Ways to run one ------------------------------------------------------------------------------------------------------
def _eager(operation: Operation) -> Call:
    arguments = operation.arguments()
    return lambda: tensors(operation.reference(**arguments))


def _compiled(operation: Operation) -> Call:
    """The reference as inductor fuses it; traced first, for one of them contains a gradient."""
    arguments = operation.arguments()
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(operation.reference(**arguments | dict(zip(names, values, strict=True)))))

    values = [arguments[name] for name in names]
    compiled = torch.compile(make_fx(function)(*values), fullgraph=True, dynamic=False)
    return lambda: list(compiled(*values))


def _triton(operation: Operation) -> Call:
    arguments = operation.arguments()

    def call() -> list[Tensor]:
        with ops.kernels("triton"):
            return tensors(operation.kernel(**arguments))

    return call


def _by_library(backend: SDPBackend, operation: Operation) -> Call:
    """Attention by one of those among which PyTorch chooses."""
    arguments = operation.arguments()

    def call() -> list[Tensor]:
        with sdpa_kernel(backend):
            return tensors(operation.reference(**arguments))

    return call


_LIBRARIES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
IMPLEMENTATIONS: dict[str, Callable[[Operation], Call]] = {
    "eager": _eager, "compiled": _compiled, "triton": _triton,
    **{name: partial(_by_library, backend) for name, backend in _LIBRARIES.items()},
}  # fmt: skip


# What they are called with --------------------------------------------------------------------------------------------
def _operations(device: torch.device, small: bool) -> Iterator[tuple[str, str, Operation]]:
    """Name, what else the case's name says, and the operation."""
    norm_shape = _SMALL_NORM_SHAPE if small else _NORM_SHAPE[device.type]
    precisions = _PRECISIONS[device.type]
    for precision in precisions:
        suffix = f"-{precision}" if len(precisions) > 1 else ""
        arguments = partial(_norm_arguments, norm_shape, PRECISIONS[precision], device)
        reference, kernel = ops.group_norm_silu_reference, ops.group_norm_silu
        yield "group_norm_silu", suffix, Operation(reference, kernel, arguments)
        with_gradient = Operation(_with_gradient(reference), _with_gradient(kernel), arguments)
        yield "group_norm_silu_with_gradient", suffix, with_gradient
    if small or device.type == "cuda":  # the CPU has no kernel for it
        shape = _SMALL_HEADS_SHAPE if small else _HEADS_SHAPE
        arguments = partial(_attention_arguments, shape, PRECISIONS[precisions[0]], device)
        yield "attention", "", Operation(_attention_reference, _attention, arguments)
        with_gradient = Operation(_with_gradient(_attention_reference), _with_gradient(_attention), arguments)
        yield "attention_with_gradient", "", with_gradient


def _attention(x: Tensor) -> Tensor:
    return ops.attention(x)


def _attention_reference(x: Tensor) -> Tensor:
    return ops.attention_reference(x)


def _with_gradient(function: Function) -> Function:
    """The function of the same arguments that returns the value and the gradient of its sum in x."""

    def value_and_gradient(x: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = function(x, **others)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), gradient

    return value_and_gradient


def _norm_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Arguments:
    """A normalisation of an ADM block, channels-last as in the networks."""
    generator = torch.Generator().manual_seed(0)
    batch, channels = shape[:2]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    x = normal(*shape).contiguous(memory_format=torch.channels_last)
    scale, shift = normal(batch, 2 * channels).chunk(2, dim=1)
    affine = {"weight": normal(channels), "bias": normal(channels), "scale": scale, "shift": shift}
    return {"x": x, "num_groups": _GROUPS, "eps": _EPS, **affine}


def _attention_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Arguments:
    """Queries, keys and values of an ADM block, head by head as its linear layer writes them."""
    batch, heads, tokens, channels = shape
    drawn = torch.randn(batch, tokens, heads, 3, channels, generator=torch.Generator().manual_seed(0))
    return {"x": drawn.to(device, dtype).permute(3, 0, 2, 1, 4)}
