"""Noise of CUDA without CUDA: the numbers that torch's generator drew on other people's GPUs, as they published them.

What nobody has checked on a GPU yet is marked so: `python benchmarks/gpu.py --part "noise of CUDA"` does.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.config import NOISES, SamplingConfig
from dgfast.errors import UserError
from dgfast.networks import Networks
from dgfast.one_step import OneStep
from dgfast.randomness import CudaStreams, SeedStreams, Streams, source
from dgfast.randomness.cuda import SMALLEST_WAVE, words
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
CPU = torch.device("cpu")
A4000, A100, H100 = 48 * 1536, 108 * 2048, 132 * 2048  # threads at once: processors x threads of one


def drawn(seed: int, *shape: int, threads: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    return CudaStreams([seed], threads).normal(shape, dtype, CPU)[0]


def test_philox_gives_the_known_answers_of_its_authors() -> None:
    """Random123's kat_vectors: counter and key of zeros, of ones, and digits of pi."""
    ones = torch.tensor([-1])
    pi = torch.tensor([0x03707344_13198A2E]), 0x85A308D3_243F6A88, torch.tensor([0x299F31D0_A4093822])
    for (threads, calls, keys), expected in (
        ((torch.tensor([0]), 0, torch.tensor([0])), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones, -1, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((pi[0], pi[1] - 2**64, pi[2]), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(word):08x}" for word in words(keys, threads, calls)) == expected


# Published by users of torch, with all digits that they give. Below one wave on any GPU:
def test_cuda_noise_is_what_torch_drew_on_gpus() -> None:
    close: Any = pytest.approx
    assert drawn(10, 3).tolist() == close([-0.1029, 1.6810, -0.2708], abs=5e-5)  # pytorch issue 79496
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]  # stable-diffusion-webui, modules/rng_philox.py, which computes in float64
    assert (drawn(0, 3, 4) - torch.tensor(expected)).abs().max() < 1e-6
    rows = drawn(42, 1, 64, 2048, threads=A100)[0]  # issue 158398
    assert rows[0, [0, 1, 2, -3, -2, -1]].tolist() == close(
        [0.1940, 2.1614, -0.1721, 1.4540, -2.7733, -0.8932], abs=5e-5
    )
    assert rows[1, :3].tolist() == close([-0.4574, 0.8063, 0.1580], abs=5e-5)
    image = drawn(43, 1, 3, 128, 128, threads=84 * 1536)  # issue 62467, RTX A6000
    assert image[0, :, 0, 0].tolist() == close([1.9983, 0.8704, 2.1127], abs=5e-5)


def test_cuda_noise_above_one_wave_is_what_these_gpus_drew() -> None:
    """Where threads draw several numbers each, of several lanes and calls."""
    close: Any = pytest.approx
    table = 5 + 5**0.5 * drawn(14, 1000, 100, threads=A4000)  # issue 97097
    assert table[0, :3].tolist() == close([2.8731, 5.2727, 2.9889], abs=1e-4)
    last = [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604]
    assert table[-1, [0, 1, 2, -3, -2, -1]].tolist() == close(last, abs=1e-4)
    for threads, last in ((H100, [-0.6970, -0.7780, 0.3267]), (A100, [0.1549, -0.6797, -0.1656])):
        row = drawn(1, 1, 9_483_264, threads=threads)[0]  # issue 143086
        assert row[:3].tolist() == close([-0.2963, 2.6764, -0.1408], abs=5e-5)
        assert row[-3:].tolist() == close(last, abs=5e-5)


# Predictions that no GPU has confirmed yet ----------------------------------------------------------------------------
LABELS_OF_10 = [4, 7, 9, 3, 3, 0, 0, 7, 7, 2, 8, 4, 4, 9, 9, 4]
LABELS_OF_1000 = [164, 587, 359, 473, 623, 360, 810, 627, 707, 602, 488, 334, 954, 849, 99, 434]


@pytest.mark.parametrize("classes, expected", [(10, LABELS_OF_10), (1000, LABELS_OF_1000)], ids=str)
def test_cuda_labels_come_after_the_latents(classes: int, expected: list[int]) -> None:
    streams = CudaStreams(range(16))
    streams.normal((3, 32, 32), torch.float32, CPU)
    labels = streams.labels(classes)
    assert labels.dtype == torch.int64 and labels.tolist() == expected


@pytest.mark.parametrize("conditional", [True, False])
def test_cuda_churn_comes_after_the_labels_in_the_type_of_the_state(conditional: bool) -> None:
    shape = (3, 32, 32)
    streams = CudaStreams([0])
    streams.normal(shape, torch.float32, CPU)
    if conditional:
        streams.labels(10)
    churn = streams.normal(shape, torch.float64, CPU).flatten()
    expected = [1.496659, -0.657806, -0.280722] if conditional else [0.329211, 0.250725, 0.905525]
    assert churn.dtype == torch.float64 and churn[:3].tolist() == pytest.approx(expected, abs=5e-7)


def test_cuda_churn_of_a_float32_state_is_another_one() -> None:
    streams = CudaStreams([0])
    streams.normal((4, 64, 64), torch.float32, CPU)
    streams.labels(1000)
    churn = streams.normal((4, 64, 64), torch.float32, CPU).flatten()
    assert churn[:4].tolist() == pytest.approx([2.544097, -0.716349, -0.493369, 0.126711], abs=5e-7)


# What must hold of any source -----------------------------------------------------------------------------------------
def draws(streams: Streams) -> list[Tensor]:
    latents = streams.normal((2, 5, 3), torch.float32, CPU)
    labels = streams.labels(1000)
    return [latents, labels, *streams.normals(3, (2, 5, 3), torch.float64, CPU), streams.labels(7)]


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_a_seed_is_that_of_the_seed_alone(noise: str) -> None:
    seeds = [3, 0, 2**32 - 1, 2**31, 3]
    together, alone = draws(source(noise, 30)(seeds)), [draws(source(noise, 30)([seed])) for seed in seeds]
    for k, draw in enumerate(together):
        assert torch.equal(draw, torch.cat([one[k] for one in alone]))
    numbers = torch.cat([draw.flatten(1) for draw in together if draw.ndim > 1], dim=1)
    assert len(numbers[0].unique()) == numbers.shape[1] and len(numbers.unique(dim=0)) == len(seeds) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cuda_noise_is_normal(dtype: torch.dtype) -> None:
    """Its moments, and those of pairs, of elements that come from every lane of many calls."""
    x = drawn(5, 100_000, threads=256, dtype=dtype).double()
    error = 5 / math.sqrt(len(x))
    assert abs(x.mean()) < error and abs(x.var() - 1) < 2 * error and abs((x**4).mean() - 3) < 10 * error
    for step in (1, 256, 512, 1024):
        assert abs((x[:-step] * x[step:]).mean()) < error


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_cuda_noise_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    usual = CudaStreams(range(5)).normal((1, 4, 4), torch.float32, CPU)
    monkeypatch.setattr("dgfast.randomness.cuda._AT_ONCE", {"cpu": at_once})
    assert torch.equal(CudaStreams(range(5)).normal((1, 4, 4), torch.float32, CPU), usual)


# In a sampler ---------------------------------------------------------------------------------------------------------
class Counted(CudaStreams):
    """Notes what is drawn of it."""

    made: list["Counted"] = []  # noqa: RUF012 - of one test

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.drawn: list[object] = []
        self.made.append(self)

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.drawn.append(dtype)
        return super().normal(shape, dtype, device)

    def labels(self, count: int) -> Tensor:
        self.drawn.append("labels")
        return super().labels(count)


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sampler_draws_in_the_order_of_the_network(
    tiny_net: NetFactory, label_dim: int, every_step: bool, dtype: torch.dtype
) -> None:
    """EDM's: churn's noise in every step, in the type of the state, float64; EDM2's: in float32 where it churns."""
    net = copy(tiny_net(label_dim=label_dim))
    net.draws_every_step = every_step
    config = SamplingConfig(num_steps=5, solver="euler", S_churn=2, S_min=0.05, S_max=50)
    sampler, Counted.made = Sampler(Networks(net), config, state_dtype=dtype, noise=Counted), []
    churning = sum(step.gamma > 0 for step in sampler.steps)
    assert 0 < churning < 5
    sampler([4], None if not label_dim else [0])  # a given label is drawn all the same
    count = 5 if every_step else churning
    assert Counted.made[0].drawn == [torch.float32, *["labels"] * bool(label_dim), *[dtype] * count]


def test_sampler_draws_no_noise_for_churn_of_a_plain_run(tiny_net: NetFactory) -> None:
    Counted.made = []
    Sampler(Networks(tiny_net()), SamplingConfig(num_steps=2), noise=Counted)([4])
    assert Counted.made[0].drawn == [torch.float32]


def test_noise_of_steps_that_churn_alone_is_zero_elsewhere(tiny_net: NetFactory) -> None:
    """Where a step adds none, it makes no difference to the image whether noise was drawn for it."""
    net = copy(tiny_net())
    config = SamplingConfig(num_steps=4, S_churn=2, S_max=1.0)  # the last steps
    every = Sampler(Networks(net), config)
    net.draws_every_step = False
    some = Sampler(Networks(net), config)
    assert 0 < sum(step.churns for step in some.steps) < 4
    latents = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    noises = torch.randn((4, 1, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = sum(not step.churns for step in some.steps)
    images = every.integrate(latents, noise=iter(noises).__next__)
    torch.testing.assert_close(some.integrate(latents, noise=iter(noises[first:]).__next__), images)


def test_sampler_and_generator_take_noise_of_cuda(tiny_net: NetFactory, filled_net: Any) -> None:
    shape = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "latent_dim": 6, "channels": [16, 8]}
    generator = filled_net("Generator", shape, "bundle/generator/")
    net = tiny_net(label_dim=3)
    seeds = [5, 7]

    def sampler(noise: Any) -> Sampler:
        return Sampler(Networks(net), SamplingConfig(num_steps=2), noise=noise)

    for kind in (sampler, lambda noise: OneStep(generator, noise=noise)):
        images = kind("cuda")(seeds)
        assert torch.equal(images, kind(CudaStreams)(seeds)) and not torch.equal(images, kind("cpu")(seeds))
        torch.testing.assert_close(images[1:], kind("cuda")(seeds[1:]), rtol=0, atol=1e-3)
        one = CudaStreams(seeds)
        one.normal((8, 8), torch.float32, CPU)
        labels = kind("cuda").draw_labels(seeds)
        assert labels is not None and torch.equal(labels, one.labels(3))
    latents = CudaStreams(seeds).normal((6,), torch.float32, CPU)
    assert torch.equal(OneStep(generator, noise="cuda")(seeds), generator(latents, torch.eye(3)[labels]))


def test_noise_that_there_is_none_of_is_refused(tiny_net: NetFactory) -> None:
    net = copy(tiny_net())
    with pytest.raises(UserError, match=r"noise 'gpu' is not one of cpu, cuda"):
        Sampler(Networks(net), noise="gpu")
    with pytest.raises(UserError, match="no whole number"):
        CudaStreams([2**32])
    net.img_resolution = math.isqrt(SMALLEST_WAVE) + 1
    with pytest.raises(UserError, match=r"noise cuda: an image has 41,209 numbers, and above 40,960 GPUs draw"):
        Sampler(Networks(net), noise="cuda")
    with pytest.raises(UserError, match="noise cuda"):
        drawn(0, SMALLEST_WAVE + 1)
    assert drawn(0, SMALLEST_WAVE).tolist() == drawn(0, SMALLEST_WAVE, threads=A100).tolist()
    assert isinstance(source("cpu", 10**6)([1]), SeedStreams)
