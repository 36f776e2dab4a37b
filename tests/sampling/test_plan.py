"""What the plan and the sampler settle before the first network call: among which classes, and with which noise."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.plan import class_count
from dgfast.sampler import Sampler
from tests.support.adm import exact

NetFactory = Callable[..., Any]
ENCODER = {
    "image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "num_head_channels": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("guidance", "classes"),
    [
        (GuidanceConfig(), 0),
        (GuidanceConfig(dg_weight=1.0), 0),
        (GuidanceConfig(classifier_scale=1.0), 5),
        (GuidanceConfig(diversity=1.0), 5),
        (GuidanceConfig(diversity=1.0, target_class=2), 0),
        (GuidanceConfig(fidelity=1.0), 5),
        (GuidanceConfig(fidelity=1.0, base_class=0), 0),
        (GuidanceConfig(diversity=1.0, target_class=2, fidelity=1.0), 5),
        (GuidanceConfig(diversity=1.0, fidelity=1.0, base_class=2), 5),
    ],
)
def test_labels_choose_among_a_classifiers_classes_only_where_they_guide(
    tiny_net: NetFactory, filled_net: NetFactory, guidance: GuidanceConfig, classes: int
) -> None:
    classifier = NoisyClassifier(filled_net("EncoderUNetModel", ENCODER, "plan/"))
    assert class_count(Networks(tiny_net(), classifier=classifier), guidance) == classes
    conditional = Networks(tiny_net(label_dim=4), classifier=classifier)
    assert class_count(conditional, guidance) == 4  # the score network's own, whatever guides
    unknown = Networks(tiny_net(), classifier=lambda u, t: u.flatten(1))
    assert class_count(unknown, guidance) == 0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_adds_eta_times_the_posteriors_noise(eta: float) -> None:
    """arXiv 2010.02502, equations 12 and 16, in sigma and by hand; without eta no noise is drawn."""
    net, count = exact(), 5
    config = SamplingConfig(solver="ddim", eta=eta, respacing=str(count))
    generator = torch.Generator().manual_seed(0)
    latents, *noises = torch.randn(count + 1, 2, 1, 2, 2, dtype=torch.float64, generator=generator)
    drawn = 0

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        return noises[drawn - 1]

    sampler = Sampler(Networks(net), config)
    images = sampler.integrate(latents, noise=noise)
    assert drawn == (count if eta else 0)
    sigmas = [*(step.sigma for step in sampler.steps), 0.0]
    x = latents * math.sqrt(1 + sigmas[0] ** 2)
    for (sigma, sigma_next), fresh in zip(itertools.pairwise(sigmas), noises, strict=True):
        denoised = net(x, torch.full((2,), sigma, dtype=torch.float64))
        spread = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        x = denoised + math.sqrt(sigma_next**2 - spread**2) / sigma * (x - denoised) + spread * fresh
    torch.testing.assert_close(images, x, rtol=1e-5, atol=1e-5)
