"""All guidances at once: of weight nothing they are nothing, and they add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import (
    OUTSIDE_WINDOW,
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    guided_denoiser,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.guidance import (
    NO_WINDOW,
    batch,
    exact_classifier,
    unwanted,
)

NetFactory = Callable[..., Any]


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m"])
def test_guidance_of_weight_nothing_is_the_plain_sampler_bit_for_bit(tiny_net: NetFactory, solver: str) -> None:
    """And it runs none of the networks that would guide."""
    net, config = tiny_net(label_dim=3), SamplingConfig(num_steps=6, solver=solver)
    plain = Sampler(Networks(net), config)
    idle = Sampler(
        Networks(net, discriminator=unwanted, classifier=unwanted, reference=unwanted),
        config,
        GuidanceConfig(dg_weight=0.0, dg_weight_2nd=0.0, classifier_scale=0.0, cfg_scale=1.0, autoguidance=1.0),
    )
    assert torch.equal(idle(seeds=[4, 5], labels=[2, 0]), plain(seeds=[4, 5], labels=[2, 0]))
    assert idle.guidance_gradients == 0 and idle.score_evaluations == plain.score_evaluations


def test_guidances_add_up_in_any_order(tiny_net: NetFactory, tiny_discriminator: NetFactory) -> None:
    net, worse = tiny_net(label_dim=2), tiny_net(label_dim=2, prefix="worse/")
    guidances: list[Guidance] = [
        DiscriminatorGuidance(tiny_discriminator(), 1.5, NO_WINDOW),
        ClassifierGuidance(exact_classifier, 0.7),
        ClassifierFreeGuidance(net, 2.0),
        Autoguidance(worse, 1.4),
    ]
    x, sigma = batch(seed=10, pixels=8)
    labels = F.one_hot(torch.arange(len(x)) % 2, 2).float()
    plain, unjudged = guided_denoiser(net, [])(x, sigma, labels)
    assert plain.dtype == x.dtype and torch.equal(plain, net(x, sigma, labels).double())
    assert (unjudged == OUTSIDE_WINDOW).all()
    together, log_ratio = guided_denoiser(net, guidances)(x, sigma, labels)
    alone = [guided_denoiser(net, [guidance])(x, sigma, labels)[0] - plain for guidance in guidances]
    assert all(correction.abs().max() > 1e-3 for correction in alone)
    torch.testing.assert_close(together, plain + sum(alone))
    backwards, log_ratio_backwards = guided_denoiser(net, guidances[::-1])(x, sigma, labels)
    torch.testing.assert_close(together, backwards)
    assert torch.equal(log_ratio, log_ratio_backwards) and (log_ratio != OUTSIDE_WINDOW).all()
