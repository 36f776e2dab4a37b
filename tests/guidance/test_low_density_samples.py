"""Samples under low-density guidance: the paper's own algorithm, the mixture of classes, digits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dgfast
from dgfast import bundle as bundles
from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import (
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    guided_denoiser,
    guided_posterior,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers import ancestral_step
from tests.support.guidance import (
    CLASSES,
    MEANS,
    Exact,
    batch,
    column,
    exact_classifier,
    mixture,
    reference_norm,
    rows,
)

NetFactory = Callable[..., Any]


# The published ancestral form -----------------------------------------------------------------------------------------
def reference_gradient(image: Tensor, sigma: Tensor, labels: Tensor, how: str) -> Tensor:
    image = image.detach().requires_grad_()
    log_probability = (exact_classifier(image, nl.vp_time(sigma)).log_softmax(dim=1) * labels).sum()
    return reference_norm(torch.autograd.grad(log_probability, image)[0], how)


def algorithm_1(
    latents: Tensor, noises: list[Tensor], levels: list[float], label: int, a: float, b: float, how: str
) -> Tensor:
    """Algorithm 1 of arXiv 2606.13347 in its own coordinates, x_t of unit variance, on class 0's exact denoiser."""
    x_t, labels = latents, rows(label, len(latents))
    bars = [1 / (1 + level**2) for level in levels] + [1.0]
    for i, level in enumerate(levels):
        bar, bar_next = bars[i], bars[i + 1]
        sigma = torch.full((len(x_t),), level, dtype=torch.float64)
        x0hat = CLASSES[0](x_t / bar**0.5, sigma, None)
        beta = 1 - bar / bar_next
        mu = (bar_next**0.5 * beta * x0hat + (bar / bar_next) ** 0.5 * (1 - bar_next) * x_t) / (1 - bar)
        variance = beta * (1 - bar_next) / (1 - bar)
        mu = mu - a * variance * reference_gradient(x_t, sigma, labels, how)
        mu = mu + b * variance * reference_gradient(x0hat, sigma, labels, how)
        x_t = mu + variance**0.5 * noises[i]
    return x_t


@pytest.mark.parametrize("how", ["none", "sample_l2"])
@pytest.mark.parametrize(("a", "perceptual"), [(1.5, False), (0.7, True)])
def test_low_density_under_ddpm_is_the_papers_algorithm(how: str, a: float, perceptual: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=generator)
    noises = [torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(12)]
    config = SamplingConfig(num_steps=12, solver="ddpm", sigma_min=0.5, sigma_max=50.0)
    guidance = GuidanceConfig(diversity=a, fidelity=2.0, perceptual=perceptual, normalize=how)
    sampler = Sampler(Networks(Exact(CLASSES[0]), classifier=exact_classifier), config, guidance)
    images = sampler.integrate(latents, rows(1, 8), iter(noises).__next__)
    levels = [step.sigma for step in sampler.steps]
    reference = algorithm_1(latents, noises, levels, 1, -a if perceptual else a, 2.0, how)
    assert (images - reference).abs().max() < 1e-4
    unguided = algorithm_1(latents, noises, levels, 1, 0.0, 0.0, how)
    assert (images - unguided).abs().max() > 0.01


def test_low_density_shift_is_a_correction_of_the_denoised_image() -> None:
    """By the posterior variance: alpha' sigma'^2 at the next level in the place of sigma^2 alpha, the gate at this."""
    x, _ = batch(seed=10)
    sigma, sigma_next = (torch.full((len(x),), level, dtype=torch.float64) for level in (2.0, 1.2))
    labels = rows(1, len(x))
    guidances: list[Guidance] = [LowDensityGuidance(exact_classifier, 0.8), PredictedCleanGuidance(exact_classifier, 2)]
    log_variance = (nl.vp_alpha(sigma_next) ** 2 * sigma_next**2 * (1 - (sigma_next / sigma) ** 2)).log()
    posterior = guided_posterior(CLASSES[0], guidances)(x, sigma, labels, log_variance, log_variance)
    step = ancestral_step(x, *posterior[:3], column(sigma), column(sigma_next), torch.zeros_like(x))
    here, there = (level**2 * nl.vp_alpha(level) for level in (sigma, sigma_next))
    plain, guided = (guided_denoiser(CLASSES[0], some)(x, sigma, labels)[0] for some in ([], guidances))
    denoised = plain + column(there / here) * (guided - plain)
    torch.testing.assert_close(step, denoised + column(sigma_next / sigma) ** 2 * (x - denoised))
    assert (guided - plain).abs().max() > 0.1


# Samples --------------------------------------------------------------------------------------------------------------
def test_low_density_samples_are_the_mixtures() -> None:
    """Path by path: the flow of one class, guided at diversity 1, ends where the flow of both classes does."""
    start = torch.randn(2000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config, labels = SamplingConfig(num_steps=48), rows(0, 2000)
    guided = Sampler(
        Networks(Exact(CLASSES[0]), classifier=exact_classifier), config, GuidanceConfig(diversity=1.0)
    ).integrate(start, labels)
    both = Sampler(Networks(Exact(mixture)), config).integrate(start, labels)
    assert (guided - both).abs().max() < 1e-3
    assert (guided > sum(MEANS) / 2).double().mean() == pytest.approx(0.5, abs=0.05)  # half of class 0 looks like 1


def test_mnist32_diversity_lowers_confidence_and_fidelity_brings_it_back() -> None:
    networks, judge = dgfast.load("mnist32"), bundles.read("mnist32").load("features")
    labels = torch.arange(40) % 10

    def confidence(**weights: Any) -> float:
        config = SamplingConfig(num_steps=8, solver="dpmpp-2m")
        images = Sampler(networks, config, GuidanceConfig(**weights))(range(40), labels)
        with torch.no_grad():
            return -float(F.cross_entropy(judge(images), labels))

    plain, rare, kept = confidence(), confidence(diversity=3.0), confidence(diversity=3.0, fidelity=6.0)
    assert rare < kept - 0.2 and rare < plain - 0.5
    assert confidence(diversity=3.0, perceptual=True) > plain
