"""Different seeds, different images: no two seeds of the 2^32 are folded onto one another."""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgfast.config import SamplingConfig
from dgfast.networks import Networks
from dgfast.one_step import OneStep
from dgfast.randomness import SeedStreams
from dgfast.randomness import seeds as module_of_seeds
from dgfast.sampler import Sampler

CPU = torch.device("cpu")
SEEDS = [0, 1, 7, 2**16, 2**16 + 7, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 7, 2**31 + 2**16, 2**32 - 1]


def test_seeds_draw_different_latents_labels_and_noise() -> None:
    streams = SeedStreams(SEEDS)
    latents = streams.normal((1, 4, 4), torch.float32, CPU)
    labels = torch.stack([streams.labels(1000) for _ in range(4)], dim=1)
    noise = streams.normal((1, 4, 4), torch.float64, CPU)
    for draws in (latents, labels, noise):
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(SEEDS)
    assert not torch.equal(latents.double(), noise)  # the stream goes on


def test_seeds_of_numpy_are_those_of_python() -> None:
    shape, dtype = (1, 2, 2), torch.float32
    mine = SeedStreams(list(np.array([3, 2**31 + 3]))).normal(shape, dtype, CPU)
    assert torch.equal(mine, SeedStreams([3, 2**31 + 3]).normal(shape, dtype, CPU))


def test_seeds_draw_different_images(tiny_net: Callable[..., Any], filled_net: Callable[..., Any]) -> None:
    sampler = Sampler(Networks(tiny_net()), SamplingConfig(num_steps=2, solver="euler"))
    shape = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "latent_dim": 6, "channels": [16, 8]}
    generator: Any = filled_net("Generator", shape, "bundle/generator/")
    for draw in (sampler, lambda seeds: OneStep(generator)(seeds, [0] * len(seeds))):
        for seed in (0, 5):
            first, second = draw([seed, seed + 2**31])
            assert (first - second).abs().max() > 1e-2


# Drawn ahead ----------------------------------------------------------------------------------------------------------
CUDA = torch.device("cuda")


def drawn_one_by_one(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What torch's own `randn` draws: a generator a seed, one draw after the other."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return [torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators]) for _ in range(count)]


class Device:
    """Stands in for a GPU that is behind: what is sent to it arrives when somebody waits, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrivals: list[Callable[[], object]] = []
        monkeypatch.setattr(module_of_seeds, "_sent", self._sent)
        buffer = SeedStreams._buffer
        monkeypatch.setattr(SeedStreams, "_buffer", lambda streams, shape, dtype, _: buffer(streams, shape, dtype, CPU))

    def _sent(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        assert device == CUDA
        noise = torch.full_like(buffer, torch.nan)
        self.arrivals.append(lambda: noise.copy_(buffer) if noise.isnan().any() else None)
        return noise, self.arrivals[-1]


def drawing_threads() -> int:
    return sum(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_seeds_drawn_ahead_are_those_drawn_one_by_one(
    monkeypatch: pytest.MonkeyPatch, count: int, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    stand_in = Device(monkeypatch)
    before = drawing_threads()
    with closing(SeedStreams(SEEDS).normals(count, shape, dtype, device)) as noises:
        drawn = list(noises)
    for arrival in stand_in.arrivals:
        arrival()
    assert drawing_threads() == before
    expected = drawn_one_by_one(count, shape, dtype)
    assert all(torch.equal(noise, one) for noise, one in zip(drawn, expected, strict=True))


def test_seeds_are_drawn_at_most_two_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    filled, draws = SeedStreams._filled, []

    def counted(streams: SeedStreams, buffer: Tensor) -> Tensor:
        draws.append(threading.current_thread())
        return filled(streams, buffer)

    monkeypatch.setattr(SeedStreams, "_filled", counted)
    with closing(SeedStreams(SEEDS).normals(9, (1, 2, 2), torch.float64, CUDA)) as noises:
        for taken in range(1, 6):
            next(noises)
            time.sleep(0.02)  # for a thread that drew all that it could
            assert taken < len(draws) <= taken + 2
    assert len({*draws}) == 1 and draws[0] is not threading.current_thread()


@pytest.mark.parametrize("stop", [ValueError("theirs"), KeyboardInterrupt()], ids=repr)
def test_seeds_thread_ends_with_the_batch_that_fails(monkeypatch: pytest.MonkeyPatch, stop: BaseException) -> None:
    Device(monkeypatch)
    before = drawing_threads()
    with (
        pytest.raises(type(stop)),
        closing(SeedStreams(SEEDS).normals(9, (1, 2, 2), torch.float64, CUDA)) as noises,
    ):
        next(noises)
        assert drawing_threads() == before + 1
        raise stop
    assert drawing_threads() == before


def test_seeds_that_cannot_be_drawn_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    filled, draws = SeedStreams._filled, []

    def failing(streams: SeedStreams, buffer: Tensor) -> Tensor:
        draws.append(1)
        if len(draws) == 3:
            raise MemoryError("no room for the third")
        return filled(streams, buffer)

    monkeypatch.setattr(SeedStreams, "_filled", failing)
    before = drawing_threads()
    noises = SeedStreams(SEEDS).normals(9, (1, 2, 2), torch.float64, CUDA)
    assert [len(next(noises)) for _ in range(2)] == [len(SEEDS)] * 2
    with pytest.raises(MemoryError, match="no room for the third"):
        next(noises)
    assert drawing_threads() == before


def test_seeds_are_sent_with_an_event_that_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of CUDA themselves, on the CPU: a stream that notes what it is asked for."""
    calls: list[str] = []

    class Stream:
        def record_event(self) -> "Stream":
            calls.append("recorded")
            return self

        def synchronize(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    buffer = torch.ones(2)
    noise, arrival = module_of_seeds._sent(buffer, CPU)
    assert torch.equal(noise, buffer) and calls == ["recorded"]
    arrival()
    assert calls == ["recorded", "waited"]
