"""Churn and boosting, seen from the network: at which noise level it is called, and with how much noise."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.networks import Networks
from dgfast.randomness import SeedStreams
from dgfast.sampler import Sampler
from tests.support.adm import exact

NetFactory = Callable[..., Any]


def unit_noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Watched:
    """A denoiser that keeps what it was called with."""

    net: Any
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        self.calls.append((x.clone(), sigma.clone()))
        return self.net(x, sigma, class_labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


@dataclass(eq=False)
class Zero:
    """A denoiser that sees black in everything."""

    img_channels: int = 1
    img_resolution: int = 2
    label_dim: int = 0
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


def churned_run(net: Any, config: SamplingConfig, latents: Tensor, noises: Tensor) -> tuple[Tensor, list[float]]:
    """EDM's algorithm 2 in plain words, after generate.py: the images, and the level that each step starts at."""
    levels = [step.sigma for step in Sampler(Networks(net), config).steps]
    x, raised = latents.double() * levels[0], []
    for i, (t, t_next) in enumerate(itertools.pairwise([*levels, 0.0])):
        gamma = min(config.S_churn / len(levels), math.sqrt(2) - 1) if config.S_min <= t <= config.S_max else 0.0
        t_hat = float(net.round_sigma(torch.tensor([t + gamma * t], dtype=torch.float64)))
        raised.append(t_hat)
        x_hat = x + math.sqrt(max(t_hat**2 - t**2, 0.0)) * config.S_noise * noises[i]
        d = (x_hat - net(x_hat, torch.full((len(x),), t_hat, dtype=torch.float64), None)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if i < len(levels) - 1:
            d_prime = (x - net(x, torch.full((len(x),), t_next, dtype=torch.float64), None)) / t_next
            x = x_hat + (t_next - t_hat) * (d + d_prime) / 2
    return x, raised


@pytest.mark.parametrize("kind", ["ddpm", "iddpm"])
def test_churn_goes_to_levels_that_a_discrete_network_knows(tiny_net: NetFactory, kind: str) -> None:
    """At a level in between, the network would be told another than the noise that the image got."""
    net = exact() if kind == "ddpm" else tiny_net(kind="iDDPMPrecond")
    watched = Watched(net)
    config = SamplingConfig(num_steps=6, S_churn=1.0, S_noise=1.1, S_min=0.05, S_max=40.0)
    side = net.img_resolution
    latents, noises = unit_noise(3, 1, side, side).float(), unit_noise(6, 3, 1, side, side, seed=1)
    sampler = Sampler(Networks(watched), config)
    with torch.no_grad():
        images = sampler.integrate(latents, noise=iter(noises).__next__)
        by_hand, raised = churned_run(net, config, latents, noises)
    assert (images - by_hand).abs().max() < 1e-6
    asked = [float(sigma[0]) for _, sigma in watched.calls]
    assert asked[::2] == pytest.approx(raised, rel=1e-12)
    levels = torch.tensor(asked, dtype=torch.float64)
    torch.testing.assert_close(net.round_sigma(levels), levels, rtol=1e-12, atol=0)
    plain = [step.sigma * (1 + step.gamma) for step in sampler.steps]
    assert raised != pytest.approx(plain, rel=1e-6), "no level had to be rounded"


@pytest.mark.parametrize("every_step", [True, False])
def test_churn_draws_where_the_network_s_authors_do(every_step: bool) -> None:
    """EDM draws noise in each step; EDM2 in those alone that churn, so that the next one has the next numbers."""
    net = Zero()
    net.draws_every_step = every_step  # type: ignore[attr-defined]
    config = SamplingConfig(num_steps=6, solver="euler", S_churn=3.0, S_min=0.1, S_max=20.0)
    sampler = Sampler(Networks(net), config)
    churning = [step.index for step in sampler.steps if step.churns]
    assert 0 < len(churning) < 6
    latents, noises = unit_noise(2, 1, 2, 2), unit_noise(6, 2, 1, 2, 2, seed=1)
    drawn: list[Tensor] = []

    def noise() -> Tensor:
        drawn.append(noises[len(drawn)])
        return drawn[-1]

    sampler.integrate(latents, noise=noise)
    assert len(drawn) == (6 if every_step else len(churning))
    seeds = [3, 4]
    by_seed = sampler(seeds)
    streams = SeedStreams(seeds)
    start = streams.normal((1, 2, 2), torch.float32, torch.device("cpu"))
    again = sampler.integrate(start, noise=lambda: streams.normal((1, 2, 2), torch.float64, torch.device("cpu")))
    torch.testing.assert_close(by_seed, again.float(), rtol=0, atol=0)


def test_churn_adds_nothing_where_rounding_takes_it_back() -> None:
    """A rise that is less than half of the way to the next level is none, not the root of a negative number."""
    net = exact()
    config = SamplingConfig(num_steps=6, S_churn=1e-4, S_noise=5.0)
    latents, noises = unit_noise(2, 1, 2, 2), unit_noise(6, 2, 1, 2, 2, seed=1)
    churned, plain = (
        Sampler(Networks(net), c).integrate(latents, noise=iter(noises).__next__)
        for c in (config, SamplingConfig(num_steps=6))
    )
    assert torch.equal(churned, plain)


@pytest.mark.parametrize("S_churn", [0.0, 1.2])
def test_boosting_churns_with_unit_noise_what_looks_generated_and_the_rest_as_asked(S_churn: float) -> None:
    """DG's code: in every fifth step the samples with negative log-ratio get S_churn 4 and S_noise 1, others what is
    asked for; in the steps between, all get that."""
    watched, steps, batch = Watched(Zero()), 12, 4
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return 0 * u.sum(dim=(1, 2, 3)) + signs

    config = SamplingConfig(num_steps=steps, solver="euler", S_churn=S_churn, S_noise=1.3)
    guidance = GuidanceConfig(dg_weight=1.0, dg_window=(0.0, 2.0), boosting=True)
    sampler = Sampler(Networks(watched, discriminator=discriminator), config, guidance)
    latents, noises = unit_noise(batch, 1, 2, 2), unit_noise(steps, batch, 1, 2, 2, seed=1)
    states = [sampler.first_state(latents)]
    sampler.integrate(latents, noise=iter(noises).__next__, on_step=lambda step, x, *_: states.append(x.clone()))
    for step, x, (x_hat, sigma_hat), noise in zip(sampler.steps, states[:-1], watched.calls, noises, strict=True):
        boosted = step.index % 5 == 0 and step.index > 0  # nobody is judged before the first step
        for k in range(batch):
            anew = boosted and signs[k] < 0
            gamma, S_noise = (4 / steps, 1.0) if anew else (S_churn / steps, 1.3)
            assert float(sigma_hat[k]) == pytest.approx(step.sigma * (1 + gamma), rel=1e-12)
            added = step.sigma * math.sqrt((1 + gamma) ** 2 - 1) * S_noise
            torch.testing.assert_close(x_hat[k], x[k] + added * noise[k], rtol=1e-9, atol=1e-9)


def test_boosting_doubles_the_guidance_of_every_second_step_where_it_looks_generated() -> None:
    steps, batch = 6, 2
    signs = torch.tensor([1.0, -1.0])

    def discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return 1e-3 * u.sum(dim=(1, 2, 3)) + signs

    config = SamplingConfig(num_steps=steps, solver="euler")
    guidance = GuidanceConfig(dg_weight=1.0, dg_window=(0.0, 2.0), boosting=True)
    sampler = Sampler(Networks(Zero(), discriminator=discriminator), config, guidance)
    latents = 1e-3 * unit_noise(batch, 1, 2, 2)
    states = [sampler.first_state(latents)]
    sampler.integrate(latents, noise=lambda: torch.zeros_like(latents), on_step=lambda _, x, *__: states.append(x))
    for step, x, x_next in zip(sampler.steps, states[:-1], states[1:], strict=True):
        if step.index % 5 == 0 and step.index:
            continue  # it churns too
        share = step.t_next / step.sigma
        denoised = (x_next - share * x) / (1 - share)  # Euler's step, turned round
        unit = 1e-3 * step.sigma**2 / math.sqrt(1 + step.sigma**2)
        boost = torch.tensor([1.0, 2.0 if step.index % 2 == 0 else 1.0]).view(-1, 1, 1, 1)
        torch.testing.assert_close(denoised, (unit * boost).expand(x.shape).double(), rtol=1e-4, atol=1e-12)
