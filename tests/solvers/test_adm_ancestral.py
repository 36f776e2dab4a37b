"""ADM's denoiser, noise levels and ancestral sampling, where closed forms exist."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from dgfast import noise_levels as nl
from dgfast.config import SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.errors import UserError
from dgfast.networks import Networks
from dgfast.noise_levels import coordinates
from dgfast.sampler import Sampler
from dgfast.solvers import ancestral_step, ddim_step, euler_step
from tests.support.adm import exact, images, steps_of


# The denoiser ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_adm_denoiser_denoises_at_the_nearest_timestep(schedule: str, predict_xstart: bool) -> None:
    net = exact(schedule, predict_xstart=predict_xstart)
    for timestep in (0, 1, 500, 999):
        sigma = net.levels[[timestep] * 2] * (1 + 1e-5)
        x = net.round_sigma(sigma).view(-1, 1, 1, 1) * images(2, 1, 2, 2)
        noise = net.levels[timestep] ** 2
        exact_image = (0.25 * x + noise * 0.3) / (0.25 + noise)
        denoised = net(x, net.round_sigma(sigma))
        assert (denoised - exact_image).abs().max() < 3e-7 * max(1, float(noise.sqrt()))
        assert net.model.seen[-1].tolist() == [timestep] * 2 == net.timesteps(sigma).tolist()
        assert torch.equal(net.round_sigma(sigma), net.levels[[timestep] * 2])


def test_adm_timesteps_are_rescaled_to_a_thousand() -> None:
    net = DDPMPrecond(nn.Linear(1, 1), 2, 1, 0, steps=250, rescale_timesteps=True)
    assert net.timesteps(net.levels).tolist() == [4.0 * k for k in range(250)]
    torch.testing.assert_close(net.time(net.levels) * 999, net.timesteps(net.levels))


def test_adm_unknown_class_is_the_networks_own_or_an_error() -> None:
    raw = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no unknown class"):
        DDPMPrecond(raw, 2, 1, 3).labels(None, 2)
    raw.null_class = 3  # type: ignore[assignment]
    net = DDPMPrecond(raw, 2, 1, 3)
    assert net.labels(None, 2).tolist() == [3, 3]  # type: ignore[union-attr]
    assert net.labels(torch.tensor([[0.0, 0, 1], [0, 0, 0]]), 2).tolist() == [2, 3]  # type: ignore[union-attr]


# Noise levels ---------------------------------------------------------------------------------------------------------
def test_adm_schedules_are_the_published_ones() -> None:
    linear, cosine = (nl.ddpm_levels(schedule, 1000) for schedule in nl.NOISE_SCHEDULES)
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(1 / (1 + linear.numpy() ** 2), np.cumprod(1 - beta), rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(1 / (1 + cosine.numpy()[:900] ** 2), f[1:901] / f[0], rtol=1e-9)  # where 0.999 is far
    for schedule, steps in (("linear", 10), ("cosine", 0), ("sine", 10)):
        with pytest.raises(ValueError, match="schedule"):
            nl.ddpm_levels(schedule, steps)


@given(steps=st.integers(1, 1200), data=st.data())
def test_adm_respacing_keeps_as_many_of_each_section_as_asked_for(steps: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(steps, 4)))
    counts = [data.draw(st.integers(1, steps // sections)) for _ in range(sections)]
    kept = nl.respaced_timesteps(",".join(map(str, counts)), steps)
    assert kept == sorted(set(kept)) and len(kept) == sum(counts)
    edges = [sum(len(part) for part in np.array_split(range(steps), sections)[:k]) for k in range(sections + 1)]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        inside = [t for t in kept if low <= t < high]
        assert len(inside) == count and inside[0] == low and (count == 1 or inside[-1] == high - 1)


def test_adm_respacing_of_ddim_has_one_whole_stride() -> None:
    assert nl.respaced_timesteps("ddim25", 1000) == list(range(0, 1000, 40))
    assert nl.respaced_timesteps("", 7) == list(range(7))


@pytest.mark.parametrize(
    "respacing", ["ddim999", "1001", "500,501", "ddim", "ddim5,5", "25.0", "10,", "0", "-3", "all"]
)
def test_adm_respacing_that_does_not_divide_is_refused(respacing: str) -> None:
    with pytest.raises(UserError, match=f"--respacing {respacing}: ") as caught:
        nl.respaced_timesteps(respacing, 1000)
    assert "\n" not in caught.value.message


# The ancestral solver -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
def test_adm_small_variance_is_exact_for_data_without_spread(schedule: str) -> None:
    """Then x has exactly noise sigma_next around that point after each step, whatever the step's length."""
    for sigma, sigma_next, (least, _) in steps_of(schedule):
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        variance, levels = least.exp() * one, (sigma, sigma_next)
        of_noise = ancestral_step(0.3 * one, 0.3 * one, 0 * one, variance, *levels, one) - 0.3
        of_x = ancestral_step((0.3 + sigma) * one, 0.3 * one, 0 * one, variance, *levels, 0 * one) - 0.3
        torch.testing.assert_close((of_noise**2 + of_x**2).sqrt(), one * sigma_next, rtol=1e-10, atol=1e-12)
        assert sigma_next == 0 or of_noise > 0


@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
def test_adm_large_variance_is_exact_for_data_of_unit_variance(schedule: str) -> None:
    """Then x in VP coordinates is a stationary AR(1) process of unit variance with coefficient sqrt(1 - beta)."""
    for sigma, sigma_next, (_, most) in steps_of(schedule):
        one, alpha, alpha_next = (
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            nl.vp_alpha(sigma),
            nl.vp_alpha(sigma_next),
        )
        x = one / alpha
        denoised = x / (1 + sigma**2)
        mean = alpha_next * ancestral_step(x, denoised, 0 * one, most.exp() * one, sigma, sigma_next, 0 * one)
        drawn = alpha_next * ancestral_step(x, denoised, 0 * one, most.exp() * one, sigma, sigma_next, one)
        torch.testing.assert_close(mean, one * (1 - most.exp()).sqrt(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((drawn - mean) ** 2, one * (most.exp() if sigma_next > 0 else 0.0))


@pytest.mark.parametrize(("v", "fixed"), [(None, "small"), (None, "large"), (-1.0, "small"), (1.0, "large"), (0.5, "")])
def test_adm_trajectory_of_gaussian_data_has_its_closed_form(v: float | None, fixed: str) -> None:
    """Mean and standard deviation over many pixels, against the recursion of the two along the steps."""
    variance, mean, pixels = 0.25, 0.3, 5000
    net = exact(v=v)
    config = SamplingConfig(solver="ddpm", respacing="8", fixed_variance=fixed or SamplingConfig().fixed_variance)
    noise = iter(images(8, pixels, 1, 2, 2, seed=1))
    x = Sampler(Networks(net), config).integrate(images(pixels, 1, 2, 2).float(), None, noise.__next__)
    at, spread = 0.0, None
    share = {None: float(fixed == "large"), -1.0: 0.0, 1.0: 1.0, 0.5: 0.75}[v]
    for sigma, sigma_next, (least, most) in steps_of(respacing="8"):
        spread = (1 + sigma**2) if spread is None else spread
        shrink, kept = variance / (variance + sigma**2), (sigma_next / sigma) ** 2
        factor = shrink + kept * (1 - shrink)
        at = mean + factor * (at - mean)
        fresh = (least + share * (most - least)).exp() * (1 + sigma_next**2) if sigma_next > 0 else 0.0
        spread = factor**2 * spread + fresh
    assert spread is not None
    count = 4 * pixels
    assert abs(float(x.mean() - at)) < 5 * math.sqrt(spread / count)
    assert abs(float(x.var() / spread) - 1) < 5 * math.sqrt(2 / count)


def test_adm_ddim_without_noise_is_eulers_step_in_sigma() -> None:
    config, x, denoised = SamplingConfig(), 40 * images(3, 1, 2, 2), images(3, 1, 2, 2, seed=1)
    t, t_next = (torch.full((3, 1, 1, 1), level, dtype=torch.float64) for level in (40.0, 25.0))
    euler = euler_step(x, denoised, t, t_next, coordinates(config, 0.002, 80.0))
    torch.testing.assert_close(ddim_step(x, denoised, t, t_next, None, 0.0), euler, rtol=1e-12, atol=1e-12)
    noise = images(3, 1, 2, 2, seed=2)
    torch.testing.assert_close(ddim_step(x, denoised, t, t_next, noise, 0.0), euler, rtol=1e-12, atol=1e-12)


def test_adm_ddim_with_all_its_noise_is_the_ancestral_step_of_small_variance() -> None:
    x, denoised, noise = (images(2, 1, 2, 2, seed=seed) for seed in range(3))
    for sigma, sigma_next, (least, _) in steps_of():
        variance = least.exp() * torch.ones_like(x)
        ancestral = ancestral_step(sigma * x, denoised, 0 * x, variance, sigma, sigma_next, noise)
        ddim = ddim_step(sigma * x, denoised, sigma, sigma_next, noise, 1.0)
        torch.testing.assert_close(ddim, ancestral, rtol=1e-10, atol=1e-12)
