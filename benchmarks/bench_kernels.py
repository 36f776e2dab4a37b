"""The operation of dgfast/ops.py: plain torch, what inductor makes of it and, on CUDA, the Triton kernels."""

import time
from typing import Any

import pytest

from benchmarks.lab import Lab
from benchmarks.measure import LOW_PRECISION_SLACK, Call, check, relative_error, synchronised, take_turns
from benchmarks.operations import KernelCase, bytes_moved, in_float64, tensors

_TOLERANCE = 2e-5


@pytest.mark.benchmark(group="kernel")
def bench_kernel(benchmark: Any, lab: Lab, kernel_case: KernelCase) -> None:
    """One operation; its bandwidth is that of the bytes which must move at least."""
    device, began = lab.device, time.perf_counter()
    call = kernel_case.call()
    results = call()
    timed = synchronised(call, device)
    timed()
    build_seconds = time.perf_counter() - began

    operation, is_eager = kernel_case.operation, kernel_case.implementation == "eager"
    error, allowed = _gate(kernel_case, results)
    benchmark.extra_info |= {"runtime": kernel_case.implementation, "error": error, "allowed_error": allowed}
    companions = {}
    if not is_eager:
        benchmark.extra_info["compile_seconds"] = build_seconds
        companions["eager"] = synchronised(KernelCase("", operation, "eager").call(), device)
    medians = take_turns(benchmark, timed, companions, lab.seconds)
    if not benchmark.disabled:
        median, moved = benchmark.stats.stats.median, bytes_moved(operation.arguments(), results)
        on_device = _device_seconds(call) if device.type == "cuda" else None
        benchmark.extra_info |= {"bytes": moved, "gb_per_second": moved / (on_device or median) / 1e9}
        if on_device is not None:
            benchmark.extra_info["device_seconds"] = on_device
        if not is_eager:
            benchmark.extra_info |= {"eager_seconds": medians["eager"], "speedup": medians["eager"] / median}


def _gate(case: KernelCase, results: Any) -> tuple[float, float]:
    """Error against the reference in float64, and the largest allowed: twice plain torch's own if that is more."""
    reference, arguments = case.operation.reference, case.operation.arguments()
    truth = tensors(reference(**in_float64(arguments)))
    plain = relative_error(tensors(reference(**arguments)), truth)
    error, allowed = relative_error(results, truth), max(_TOLERANCE, LOW_PRECISION_SLACK * plain)
    check(f"kernel {case.name}", "the reference in float64", error, allowed)
    return error, allowed


def _device_seconds(call: Call) -> float:
    """Time on the device alone: a kernel of microseconds is shorter than the wait for it."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3
