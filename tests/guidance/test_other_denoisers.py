"""Guidance by another denoiser: classifier-free and autoguidance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    guided_denoiser,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.guidance import (
    batch,
    correction_of,
)

NetFactory = Callable[..., Any]


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.5])
def test_guidance_by_another_denoiser_is_a_straight_line_between_the_two(tiny_net: NetFactory, scale: float) -> None:
    net, worse = tiny_net(label_dim=3), tiny_net(label_dim=3, prefix="worse/")
    x, sigma = batch(seed=8, pixels=8)
    labels = F.one_hot(torch.arange(len(x)) % 3, 3).float()
    conditional, unconditional = net(x, sigma, labels).double(), net(x, sigma).double()
    free, _ = guided_denoiser(net, [ClassifierFreeGuidance(net, scale)])(x, sigma, labels)
    torch.testing.assert_close(free, unconditional + scale * (conditional - unconditional))
    auto, _ = guided_denoiser(net, [Autoguidance(worse, scale)])(x, sigma, labels)
    reference = worse(x, sigma, labels).double()
    torch.testing.assert_close(auto, reference + scale * (conditional - reference))


def test_guidance_interval_is_open_below_and_closed_above(tiny_net: NetFactory) -> None:
    net, (x, _) = tiny_net(label_dim=3), batch(seed=9, pixels=8)
    sigma = torch.tensor([0.1, 0.5, 0.51, 2.0, 2.01, 40.0], dtype=torch.float64)
    labels = F.one_hot(torch.arange(6) % 3, 3).float()
    correction, _ = correction_of(ClassifierFreeGuidance(net, 2.0, (0.5, 2.0)), x, sigma, labels, net(x, sigma, labels))
    assert correction.flatten(1).any(dim=1).tolist() == [False, False, True, True, False, False]


def test_guidance_outside_its_interval_never_runs_the_unconditional_net(tiny_net: NetFactory) -> None:
    net, seen = tiny_net(label_dim=3), []

    class Watched:
        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            if class_labels is None:
                seen.append(sigma[0].item())
            return net(x, sigma, class_labels)

        def __getattr__(self, name: str) -> Any:
            return getattr(net, name)

    config = GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.2, 10.0))
    sampler = Sampler(Networks(Watched()), SamplingConfig(num_steps=8), config)
    sampler(seeds=[0, 1])
    levels = [step.sigma for step in sampler.steps]
    assert sorted(seen) == pytest.approx(sorted(s for s in levels + levels[1:] if 0.2 < s <= 10.0))
    assert len(seen) == sampler.score_evaluations - 15 > 0
