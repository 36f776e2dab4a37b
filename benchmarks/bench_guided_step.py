"""One call of the guided denoiser, and the same call without guidance."""

from typing import Any

import pytest

from benchmarks.lab import Case, Lab
from benchmarks.subjects import GUIDED_STEP

pytestmark = pytest.mark.benchmark(group=GUIDED_STEP.name)


def bench_guided_step(benchmark: Any, lab: Lab, case: Case) -> None:
    """Score forward, discriminator forward and its input gradient."""
    lab.measure(benchmark, GUIDED_STEP, case, guided=True)


def bench_unguided_step(benchmark: Any, lab: Lab, case: Case) -> None:
    """The score forward alone."""
    lab.measure(benchmark, GUIDED_STEP, case, guided=False)
