"""What the benchmarks do on a GPU alone, executed without one."""

import torch

from benchmarks import cuda_noise
from benchmarks.lab import Case, Lab
from benchmarks.machine import facts
from benchmarks.subjects import GUIDED_STEP
from dgfast import ops
from dgfast.randomness import SeedStreams
from tests.support.pretended_cuda import CAPABILITY, CUDA, NAME, pretended_cuda

CPU = torch.device("cpu")


def test_facts_of_a_gpu() -> None:
    with pretended_cuda():
        found = facts(CUDA)
    assert found["device"] == NAME and found["multiprocessors"] == 66 and found["memory_bytes"] == 2**33
    assert found["capability"] == "{}.{}".format(*CAPABILITY) and found.keys() >= {"cuda", "cudnn", "driver"}


def test_noise_that_torch_draws_itself_is_drawn_seed_by_seed() -> None:
    """By the generators of the CPU, whose draws dgfast's own noise is by definition."""
    theirs, ours = cuda_noise._Generators(CPU), SeedStreams(cuda_noise._SEEDS)
    for name, draw in cuda_noise._DRAWS.items():
        assert torch.equal(draw(theirs), draw(ours)), name  # type: ignore[arg-type]  # the two that are called


def test_noise_says_how_far_either_sine_is_from_the_devices() -> None:
    rows = list(cuda_noise._sines(CPU))
    assert [row["sine"] for row in rows if row] == ["exact", "reduced in float32"]
    assert all(0 < row["mean difference"] <= row["largest difference"] < 20 for row in rows if row)  # type: ignore[operator]


def test_lab_frees_what_it_held_before_another_batch() -> None:
    lab = Lab(CUDA, 0)
    with pretended_cuda(), ops.kernels("reference"):
        held = [lab.prepared(GUIDED_STEP, Case("tiny", "eager", batch, "float32"), guided=False) for batch in (1, 2)]
        assert [len(held[1].call()[0])] == [2]
    assert list(lab._prepared.values()) == held[1:]
