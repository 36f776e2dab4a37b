"""The operation of dgfast/ops.py: plain torch, what inductor makes of it and, on CUDA, the Triton kernels."""

import time
from typing import Any

import pytest

from benchmarks.lab import Lab
from benchmarks.measure import synchronised, take_turns
from benchmarks.operations import KernelCase, bytes_moved, device_seconds, gate


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
    error, allowed = gate(kernel_case, results)
    benchmark.extra_info |= {"runtime": kernel_case.implementation, "error": error, "allowed_error": allowed}
    companions = {}
    if not is_eager:
        benchmark.extra_info["compile_seconds"] = build_seconds
        companions["eager"] = synchronised(KernelCase("", operation, "eager").call(), device)
    medians = take_turns(benchmark, timed, companions, lab.seconds)
    if not benchmark.disabled:
        median, moved = benchmark.stats.stats.median, bytes_moved(operation.arguments(), results)
        on_device = device_seconds(call) if device.type == "cuda" else None
        benchmark.extra_info |= {"bytes": moved, "gb_per_second": moved / (on_device or median) / 1e9}
        if on_device is not None:
            benchmark.extra_info["device_seconds"] = on_device
        if not is_eager:
            benchmark.extra_info |= {"eager_seconds": medians["eager"], "speedup": medians["eager"] / median}
