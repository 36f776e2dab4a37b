"""How things are measured: number formats, synchronised timing, errors, the ceiling, and rounds that take turns."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from torch import Tensor

from dgfast import devices
from dgfast.devices import DTYPES

Call = Callable[[], Sequence[Tensor]]

TORCH_DEFAULT = "default"
"""float32 weights and torch's own flags: on CUDA, convolutions but no matrix products in TensorFloat-32."""

PRECISIONS: dict[str, torch.dtype] = {**DTYPES, TORCH_DEFAULT: torch.float32}
"""Number format -> type of the weights; "float32" is strict."""

LOW_PRECISION_SLACK = 2.0
"""Below float32 there is no exact answer; a result may be off by this many times what plain eager is off by."""

_ROUNDS = (3, 50)
_MATMUL_SIZES = {"cpu": (256, 1024, 2048), "cuda": (4096, 8192, 16384)}


class WrongResultError(AssertionError):
    """A result differs from the right one by more than rounding, so that its speed says nothing."""


def check(what: str, against: str, error: float, allowed: float) -> None:
    """The gate before every timing.

    Raises:
        WrongResultError: the error is larger than allowed, or not a number.
    """
    if not error <= allowed:
        raise WrongResultError(
            f"{what} is off by {error:.1e} relative to {against}, where {allowed:.1e} is allowed; "
            "a wrong result is not timed"
        )


def precision(name: str) -> AbstractContextManager[None]:
    """As `devices.precision`, for all of `PRECISIONS`."""
    return nullcontext() if name == TORCH_DEFAULT else devices.precision(name)


def synchronised(call: Call, device: torch.device) -> Call:
    """`call` that returns when its results are there."""
    if device.type != "cuda":
        return call

    def waited() -> Sequence[Tensor]:
        results = call()
        torch.cuda.synchronize(device)
        return results

    return waited


def seconds(call: Call) -> float:
    """Wall-clock time of one synchronised call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def relative_error(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error of any number, as a share of the largest number of its tensor; infinite for NaN."""
    errors = []
    for value, true in zip(values, truth, strict=True):
        assert value.shape == true.shape, f"{tuple(value.shape)} where {tuple(true.shape)} was expected"
        true = true.double()
        error = float((value.double() - true).abs().max() / true.abs().max())
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def matmul_ceiling(device: torch.device, name: str, most_seconds: float = 2.0) -> float:
    """Most operations a second that a square matrix product reaches on this machine in that number format.

    On a CPU the better of PyTorch's own, which is MKL's in float32, and oneDNN's: MKL slows down on AMD's processors.

    Args:
        most_seconds: spent on each size. The smallest is tried at least twice in any case, a larger one only if a
            single product takes less: some CPUs need minutes for one in bfloat16.
    """
    best = 0.0
    with precision(name):
        for size in _MATMUL_SIZES[device.type]:
            if best and 2 * size**3 / best > most_seconds:
                break
            a, b = torch.randn(2, size, size, device=device).to(PRECISIONS[name])
            for product in _products(a, b):
                call = synchronised(product, device)
                rounds = max(int(most_seconds / seconds(call)), 1)
                best = max(best, 2 * size**3 / min(seconds(call) for _ in range(rounds)))
    return best


def _products(a: Tensor, b: Tensor) -> Iterator[Call]:
    yield lambda: [a @ b]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        weight = torch.ops.mkldnn._reorder_linear_weight(b, len(a))
        yield lambda: [torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")]


def take_turns(benchmark: Any, call: Call, companions: Mapping[str, Call], most_seconds: float) -> dict[str, float]:
    """Benchmark `call`, each round preceded by one of every companion, so that a busy machine slows all alike.

    Args:
        most_seconds: of all rounds together, if that buys at least the fewest.

    Returns:
        the median seconds of each companion; empty where benchmarks are disabled.
    """
    if benchmark.disabled:
        benchmark.pedantic(call)
        return {}
    stats = {name: Stats() for name in companions}

    def companions_first() -> None:
        for name, companion in companions.items():
            stats[name].update(seconds(companion))

    round_seconds = sum(seconds(warm_up) for warm_up in (*companions.values(), call))
    fewest, most = _ROUNDS
    rounds = min(max(int(most_seconds / round_seconds), fewest), most)
    benchmark.pedantic(call, setup=companions_first, rounds=rounds)
    return {name: stat.median for name, stat in stats.items()}
