"""Which cases the benchmarks run, in which order, and what every result file says of the machine."""

import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.logger import PytestBenchmarkWarning

from benchmarks import operations
from benchmarks.lab import Case, Lab
from benchmarks.machine import facts
from benchmarks.measure import PRECISIONS, TORCH_DEFAULT
from benchmarks.runtimes import RUNTIMES, WHEN_ASKED
from benchmarks.workloads import LONG_ON_A_CPU, STAND_INS, WORKLOADS
from dgfast.devices import pick_device

_PRECISIONS = {"cpu": ("float32",), "cuda": ("bf16", "float32", TORCH_DEFAULT)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dgfast", "dgfast's benchmarks; the first four may be given several times")
    runtimes = [*RUNTIMES, *(name for name in operations.IMPLEMENTATIONS if name not in RUNTIMES)]
    group.addoption(
        "--workload", action="append", choices=list(WORKLOADS), help="default: all, but on a CPU the quicker ones"
    )
    group.addoption("--runtime", action="append", choices=runtimes, help="default: all")
    group.addoption("--precision", action="append", choices=list(PRECISIONS), help="default: what suits the device")
    group.addoption("--batch", action="append", type=int, help="default: the workload's own for the device")
    group.addoption("--device", help="default: CUDA where there is one")
    group.addoption("--seconds", type=float, default=2.0, help="most for the rounds of a benchmark; at least 3 are run")
    group.addoption("--until", type=float, help="time (seconds since 1970) after which no further benchmark begins")


def pytest_configure() -> None:
    # That nothing could be saved must not hide why nothing was timed; where this is said, the ini file's filter is
    # in force and no mark of a test.
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)


@pytest.fixture(scope="session", autouse=True)
def unheard_torch_trace() -> Iterator[None]:
    """Keep pytest from listening to the trace of torch.compile, which is only written, at five times the cost of
    compiling, if somebody listens; pytest leaves alone the loggers that propagate."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = True
    yield
    trace.propagate = False


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return pick_device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def lab(device: torch.device, pytestconfig: pytest.Config) -> Lab:
    return Lab(device, pytestconfig.getoption("seconds"))


def parametrize_none(metafunc: pytest.Metafunc, name: str) -> None:
    """What was asked for leaves no case of this benchmark: seen as skipped; an empty list is an error in tests."""
    metafunc.parametrize(name, [pytest.param(None, marks=pytest.mark.skip(reason="nothing asked for is of this kind"))])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in (("case", _cases), ("kernel_case", _kernel_cases)):
        if name in metafunc.fixturenames:
            listed = dict(cases(metafunc))
            metafunc.parametrize(name, listed.values(), ids=listed) if listed else parametrize_none(metafunc, name)


def _cases(metafunc: pytest.Metafunc) -> Iterator[tuple[str, Case]]:
    """Name and case, those of one workload, precision and batch together."""
    option = metafunc.config.getoption
    marker = metafunc.definition.get_closest_marker("benchmark")
    assert marker is not None
    at = pick_device(option("device"))
    kind = at.type
    present = [name for name, runtime in RUNTIMES.items() if name not in WHEN_ASKED and not runtime.missing(at)]
    in_full = kind == "cuda" or bool(option("precision") or option("batch"))
    left_out = {*STAND_INS, *(LONG_ON_A_CPU if kind == "cpu" else ())}
    for workload in option("workload") or [name for name in WORKLOADS if name not in left_out]:
        batches = WORKLOADS[workload]().batches.get((marker.kwargs["group"], kind), ())
        for precision in option("precision") or _PRECISIONS[kind]:
            for batch in (option("batch") or batches) if batches else ():
                for runtime in option("runtime") or present:
                    possible = ("eager",) if precision == TORCH_DEFAULT else RUNTIMES
                    if runtime in possible and precision in (TORCH_DEFAULT, *RUNTIMES[runtime].precisions):
                        case = Case(workload, runtime, batch, precision)
                        yield case.name(in_full=in_full), case


def _kernel_cases(metafunc: pytest.Metafunc) -> Iterator[tuple[str, operations.KernelCase]]:
    option = metafunc.config.getoption
    small = set(option("workload") or ()) == set(STAND_INS)
    for case in operations.cases(pick_device(option("device")), small):
        if case.implementation in (option("runtime") or operations.IMPLEMENTATIONS):
            yield case.name, case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks of one case follow one another, so that what was compiled for one serves the next."""
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    items[:] = [item for item in items if item not in ours] + sorted(ours, key=_place)
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("default"))  # a warning makes no time wrong


def _place(item: pytest.Item) -> tuple[Path, int]:
    callspec: Any = getattr(item, "callspec", None)
    return item.path, next(iter(callspec.indices.values())) if callspec else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        pytest.skip("not run: out of time")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["dgfast"] = facts(pick_device(config.getoption("device")))
