"""`benchmarks.studies.floor`: what a call must compute and move, against another count."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks.studies import floor
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS, flops


@pytest.mark.parametrize("guided", [True, False])
def test_floor_counts_the_products_that_pytorch_counts(guided: bool) -> None:
    made, device = WORKLOADS["tiny"](), torch.device("cpu")
    networks = made.load(device, torch.float32)
    arguments = noise_at([guided_levels(made, networks, device)[0]], networks, range(1), device)
    costs = floor.costs(made, guided)
    computed = sum(cost.flops for cost in costs.values())
    if guided:  # PyTorch's formula keeps the scores, where fused kernels compute them again: a product of five
        computed -= costs["attention, gradient"].flops // 5
    assert computed == flops(guided_function(made, networks, guided, device), *arguments)


@pytest.mark.parametrize("option", ["--batch", "--tflops", "--bandwidth", "--itemsize"])
def test_floor_of_nothing_is_refused_in_a_line(option: str) -> None:
    done = CliRunner().invoke(floor.main, ["--workload", "tiny", option, "0"])
    assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output


def test_floor_prints_the_larger_of_computing_and_moving() -> None:
    done = CliRunner().invoke(
        floor.main, ["--workload", "tiny", "--batch", "64", "--tflops", "1", "--bandwidth", "0.1"]
    )
    assert done.exit_code == 0, done.output
    for text in done.output.strip().split("\n\n"):
        _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        *kinds, (_, _, _, _, total, _) = rows
        least = sum(max(float(computing), float(moving)) for *_, computing, moving in kinds)
        assert float(total) == pytest.approx(least, abs=0.05 + 0.005 * len(kinds))
        for _, calls, gflop, megabytes, computing, moving in kinds:
            assert int(calls) > 0
            assert float(computing) == pytest.approx(64 * float(gflop) * 1e-3 * 1e3, abs=0.4)
            assert float(moving) == pytest.approx(64 * float(megabytes) * 1e-2, abs=0.04)
