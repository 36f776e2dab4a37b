"""A whole sampling run under guidance, from seeds to images."""

from typing import Any

import pytest

from benchmarks.lab import Case, Lab
from benchmarks.subjects import SAMPLER

pytestmark = pytest.mark.benchmark(group=SAMPLER.name)


def bench_sampler(benchmark: Any, lab: Lab, case: Case) -> None:
    """Every step of the plan; the same plan without guidance runs beside it."""
    lab.measure(benchmark, SAMPLER, case, guided=True)
