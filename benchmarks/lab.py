"""Where guided denoisers and samplers are prepared, held against eager, and timed beside it."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    LOW_PRECISION_SLACK,
    PRECISIONS,
    Call,
    check,
    matmul_ceiling,
    precision,
    relative_error,
    synchronised,
    take_turns,
)
from benchmarks.runtimes import RUNTIMES
from benchmarks.workloads import WORKLOADS, Workload
from dgfast import Networks
from dgfast.ops import kernels
from dgfast.runtimes import Runtime

_GATE_SAMPLES = 8
_CEILING_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """What one benchmark runs."""

    workload: str
    runtime: str
    batch: int
    precision: str

    def name(self, *, in_full: bool) -> str:
        """Such as edm-cifar10-compiled, in full edm-cifar10-compiled-512-bf16."""
        return f"{self.workload}-{self.runtime}" + (f"-{self.batch}-{self.precision}" if in_full else "")


@dataclass(frozen=True)
class Prepared:
    """Something ready to be timed, and how long making it so took."""

    call: Call
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What is timed: one call of the guided denoiser, or a whole sampler.

    Attributes:
        prepare: (workload, networks, runtime, guided, seeds, device) -> a call that returns one row a seed, the row of
            a seed being the same whatever the others are.
        flops: (workload, networks, guided, device) -> operations of one image.
        amplification: how many times its runtime's tolerance a result may be off: a run repeats the rounding of a call.
    """

    name: str
    prepare: Callable[[Workload, Networks, Runtime, bool, Sequence[int], torch.device], Call]
    flops: Callable[[Workload, Networks, bool, torch.device], int]
    amplification: float


class Lab:
    """Prepares what benchmarks ask for and keeps it as long as they ask for the same workload, batch and precision."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        """`seconds`: that the rounds of one benchmark may take, if that buys at least the fewest."""
        self.device, self.seconds = device, seconds
        self.ceiling = cache(lambda name: matmul_ceiling(device, name, min(seconds, _CEILING_SECONDS)))
        self.networks = lru_cache(maxsize=2)(self._load)  # those in question and, in low precision, float32 ones
        self.flops = cache(self._count)
        self._prepared: dict[tuple[object, ...], Prepared] = {}
        self._held: tuple[object, ...] = ()

    def measure(self, benchmark: Any, subject: Subject, case: Case, guided: bool) -> None:
        """Hold `case` against eager and, if it agrees, time it beside eager and beside itself without guidance.

        Raises:
            WrongResultError: it does not agree.
        """
        with precision(case.precision):
            target = self.prepared(subject, case, guided)
            error, allowed = self.gate(subject, case, guided)
            benchmark.extra_info |= vars(case) | {"guided": guided, "error": error, "allowed_error": allowed}
            if case.runtime != "eager":
                benchmark.extra_info["compile_seconds"] = target.seconds
            companions = {}
            if case.runtime != "eager":
                companions["eager"] = self._with_runtime(subject, case, "eager", guided).call
            if guided:
                companions["unguided"] = self.prepared(subject, case, guided=False).call
            medians = take_turns(benchmark, target.call, companions, self.seconds)
        if not benchmark.disabled:
            per_image = self.flops(subject, case.workload, guided)
            benchmark.extra_info |= self._figures(benchmark.stats.stats.median, medians, per_image, case)

    def gate(self, subject: Subject, case: Case, guided: bool) -> tuple[float, float]:
        """Error against plain PyTorch's float32, and the largest allowed, for a few images spread over the batch.

        Below float32 twice eager's own error in that precision is allowed: there is no other right answer to go by.

        Raises:
            WrongResultError: the error is larger.
        """
        picks = torch.linspace(0, case.batch - 1, min(_GATE_SAMPLES, case.batch)).long().unique()
        workload, seeds = WORKLOADS[case.workload](), picks.tolist()

        def eager(name: str) -> Sequence[Tensor]:
            with precision(name), kernels("reference"):
                networks = self.networks(case.workload, PRECISIONS[name])
                return subject.prepare(workload, networks, RUNTIMES["eager"], guided, seeds, self.device)()

        truth = eager("float32")
        rounding = 0.0 if case.precision == "float32" else relative_error(eager(case.precision), truth)
        allowed = max(subject.amplification * RUNTIMES[case.runtime].tolerance, LOW_PRECISION_SLACK * rounding)
        results = self.prepared(subject, case, guided).call()
        error = relative_error([result[picks.to(result.device)] for result in results], truth)
        check(f"{subject.name} {case.name(in_full=True)}", "eager in float32", error, allowed)
        return error, allowed

    def prepared(self, subject: Subject, case: Case, guided: bool) -> Prepared:
        """The call of that case, built and called once."""
        held = subject.name, case.workload, case.batch, case.precision
        if held != self._held:
            self._release()
            self._held = held
        key = case.runtime, guided
        if key not in self._prepared:
            workload, networks = WORKLOADS[case.workload](), self.networks(case.workload, PRECISIONS[case.precision])
            seeds, runtime = range(case.batch), RUNTIMES[case.runtime]
            began = time.perf_counter()
            call = synchronised(subject.prepare(workload, networks, runtime, guided, seeds, self.device), self.device)
            call()
            self._prepared[key] = Prepared(call, time.perf_counter() - began)
        return self._prepared[key]

    def _figures(self, median: float, medians: dict[str, float], per_image: int, case: Case) -> dict[str, float]:
        achieved, ceiling = case.batch * per_image / median, self.ceiling(case.precision)
        figures = {
            "images_per_second": case.batch / median,
            "gflop_per_image": per_image / 1e9,
            "gflop_per_second": achieved / 1e9,
            "ceiling_gflop_per_second": ceiling / 1e9,
            "share_of_ceiling": achieved / ceiling,
        }
        if "eager" in medians:
            figures |= {"eager_seconds": medians["eager"], "speedup": medians["eager"] / median}
        if "unguided" in medians:
            figures |= {"unguided_seconds": medians["unguided"], "guided_over_unguided": median / medians["unguided"]}
        return figures

    def _with_runtime(self, subject: Subject, case: Case, runtime: str, guided: bool) -> Prepared:
        return self.prepared(subject, Case(case.workload, runtime, case.batch, case.precision), guided)

    def _count(self, subject: Subject, workload: str, guided: bool) -> int:
        return subject.flops(WORKLOADS[workload](), self.networks(workload, torch.float32), guided, self.device)

    def _load(self, workload: str, dtype: torch.dtype) -> Networks:
        return WORKLOADS[workload]().load(self.device, dtype)

    def _release(self) -> None:
        """Free compiled functions and captured graphs: a large batch leaves no room for another beside it."""
        self._prepared.clear()
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
