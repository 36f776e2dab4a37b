"""Different seeds, different images: no two seeds of the 2^32 are folded onto one another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dgfast.config import SamplingConfig
from dgfast.networks import Networks
from dgfast.one_step import OneStep
from dgfast.randomness import SeedStreams
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
