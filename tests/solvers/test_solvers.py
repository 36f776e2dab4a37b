"""Laws of the solvers, against Gaussian data: its denoiser and its probability flow are known in closed form."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dgfast import noise_levels as nl
from dgfast.config import SamplingConfig
from dgfast.errors import UserError
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers import churn

COORDINATES = (("edm", "linear", "none"), ("vp", "vp", "vp"), ("ve", "ve", "none"))


@dataclass
class Gaussian:
    """The perfect denoiser of pixels with this mean and variance, in the type it is given."""

    mean: float = 0.3
    variance: float = 0.25
    img_channels: int = 1
    img_resolution: int = 1
    label_dim: int = 0
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    sigmas: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        self.sigmas.append(sigma[0].item())
        noise = sigma.view(-1, 1, 1, 1) ** 2
        return (self.variance * x + noise * self.mean) / (self.variance + noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def flow(self, x: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Where the probability-flow ODE carries x from one noise level to another."""
        spread = ((self.variance + sigma_next**2) / (self.variance + sigma**2)) ** 0.5
        return self.mean + spread * (x - self.mean)


def latents(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error_at_last_level(config: SamplingConfig) -> float:
    """Largest distance from the exact flow at the smallest noise level, over a few starting points."""
    data, start = Gaussian(), latents(16)
    sampler = Sampler(Networks(data), config)
    states: list[Tensor] = [sampler.first_state(start)]
    sampler.integrate(start, on_step=lambda step, x, *_: states.append(x))
    first, last = sampler.steps[0].sigma, sampler.steps[-1].sigma
    signal = sampler.coordinates.s(torch.tensor(sampler.steps[-1].t, dtype=torch.float64))
    return (states[-2] / signal - data.flow(first * start, first, last)).abs().max().item()


@pytest.mark.parametrize(
    ("solver", "alpha", "order"), [("euler", 1.0, 1), ("heun", 1.0, 2), ("heun", 0.7, 2), ("dpmpp-2m", 1.0, 2)]
)
@pytest.mark.parametrize(("discretization", "schedule", "scaling"), COORDINATES)
def test_solvers_converge_with_their_order(
    solver: str, alpha: float, order: int, discretization: str, schedule: str, scaling: str
) -> None:
    if solver == "dpmpp-2m":  # it knows one kind of coordinates, but any grid
        schedule, scaling = "linear", "none"
    counts = [65, 129, 257, 513]
    errors = [
        error_at_last_level(
            SamplingConfig(
                num_steps=n,
                solver=solver,
                alpha=alpha,
                discretization=discretization,
                schedule=schedule,
                scaling=scaling,
            )
        )
        for n in counts
    ]
    slope, _ = np.polyfit(np.log(np.array(counts) - 1), np.log(errors), 1)
    assert -slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m"])
@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_solvers_reach_the_images_of_the_exact_flow(solver: str, discretization: str) -> None:
    data, start = Gaussian(), latents(16)
    config = SamplingConfig(num_steps=128, solver=solver, discretization=discretization)
    sampler = Sampler(Networks(data), config)
    first = sampler.steps[0].sigma
    exact = data.flow(first * start, first, 0.0)
    tolerance = {"euler": 0.05, "heun": 2e-3, "dpmpp-2m": 0.02}[solver]
    assert (sampler.integrate(start) - exact).abs().max() < tolerance


@pytest.mark.parametrize(("schedule", "scaling"), [("linear", "none"), ("vp", "vp"), ("vp", "none"), ("ve", "vp")])
def test_solvers_follow_the_slope_of_the_exact_flow(schedule: str, scaling: str) -> None:
    """dx/dt of x(t) = s(t) (mean + sqrt(variance + sigma(t)^2) z), by autograd and by EDM's equation 4."""
    data = Gaussian()
    coords = nl.coordinates(SamplingConfig(schedule=schedule, scaling=scaling), 0.002, 80.0)
    level = torch.tensor([0.002, 0.05, 1.0, 20.0, 80.0], dtype=torch.float64).view(-1, 1, 1, 1)
    t = coords.sigma_inv(level).requires_grad_()
    x = coords.s(t) * (data.mean + (data.variance + coords.sigma(t) ** 2).sqrt() * 1.7)
    (exact,) = torch.autograd.grad(x.sum(), t)
    with torch.no_grad():
        a, b = coords.slope(t)
        slope = a * x - b * data(x / coords.s(t), coords.sigma(t).flatten(), None)
    torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-12)


# Churn ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("S_noise", [1.0, 1.3])
@pytest.mark.parametrize(("schedule", "scaling"), [("linear", "none"), ("vp", "vp"), ("ve", "none")])
def test_solvers_churn_raises_the_noise_to_the_level_it_names(schedule: str, scaling: str, S_noise: float) -> None:
    """Gaussian data at sigma, churned to sigma_hat, is Gaussian data at sigma_hat; S_noise scales what is added."""
    data, count = Gaussian(), 200_000
    coords = nl.coordinates(SamplingConfig(schedule=schedule, scaling=scaling), 0.02, 80.0)
    level = torch.tensor(0.5, dtype=torch.float64).view(1, 1, 1, 1)
    t, t_hat = coords.sigma_inv(level), coords.sigma_inv(1.4 * level)
    clean = data.mean + data.variance**0.5 * latents(count, seed=1)
    x = coords.s(t) * (clean + level * latents(count, seed=2))
    churned = churn(x, t, t_hat, latents(count, seed=3), S_noise, coords) / coords.s(t_hat)
    spread = (data.variance + 0.5**2 + S_noise**2 * (0.7**2 - 0.5**2)) ** 0.5
    assert churned.mean().item() == pytest.approx(data.mean, abs=5 * spread / count**0.5)
    assert churned.std().item() == pytest.approx(spread, rel=5 / (2 * count) ** 0.5)


def test_solvers_churn_keeps_the_distribution_of_the_images() -> None:
    data, count = Gaussian(), 20_000
    generator = torch.Generator().manual_seed(5)
    start = latents(count, seed=4)
    sampler = Sampler(Networks(data), SamplingConfig(num_steps=64, S_churn=40.0))
    images = sampler.integrate(start, noise=lambda: torch.randn(start.shape, dtype=start.dtype, generator=generator))
    spread = data.variance**0.5
    bias = 0.01  # of the solver itself at this number of steps
    assert images.mean().item() == pytest.approx(data.mean, abs=5 * spread / count**0.5 + bias)
    assert images.std().item() == pytest.approx(spread, rel=5 / (2 * count) ** 0.5 + bias)
    plain = Sampler(Networks(data), SamplingConfig(num_steps=64)).integrate(start)
    assert (images - plain).abs().mean() > 0.1  # it did draw other images


def test_solvers_churn_raises_each_level_by_gamma() -> None:
    """gamma is min(S_churn / N, sqrt(2) - 1) for levels in [S_min, S_max], ends included, and 0 elsewhere."""
    grid = [step.sigma for step in Sampler(Networks(Gaussian()), SamplingConfig(num_steps=10)).steps]
    for S_churn, rise in ((2.0, 0.2), (40.0, math.sqrt(2) - 1)):
        data = Gaussian()
        config = SamplingConfig(num_steps=10, S_churn=S_churn, S_min=grid[7], S_max=grid[2])
        start = latents(3)
        Sampler(Networks(data), config).integrate(start, noise=partial(torch.zeros_like, start))
        raised = np.array(data.sigmas[0::2]) / grid - 1  # Heun: every second call stands at a step's first point
        np.testing.assert_allclose(raised, [0, 0] + 6 * [rise] + [0, 0], atol=1e-12)


@pytest.mark.parametrize("wrong", [{"S_churn": 1.0}, {"schedule": "vp"}, {"scaling": "vp"}])
def test_solvers_dpmpp_2m_refuses_what_it_cannot_do(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="dpmpp-2m"):
        SamplingConfig(solver="dpmpp-2m", **wrong)


# Grids and coordinates ------------------------------------------------------------------------------------------------
@given(
    discretization=st.sampled_from(["edm", "vp", "ve"]),
    num_steps=st.integers(2, 300),
    sigma_min=st.floats(1e-3, 0.05),
    sigma_max=st.floats(2.0, 500.0),  # below, no VP process with rising beta has these ends
    rho=st.floats(1.0, 12.0),
)
def test_solvers_grids_fall_from_sigma_max_to_sigma_min(
    discretization: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> None:
    config = SamplingConfig(num_steps=num_steps, discretization=discretization, rho=rho)
    grid = nl.sigma_grid(config, sigma_min, sigma_max)
    assert grid.shape == (num_steps,) and grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[0].item() == pytest.approx(sigma_max, rel=1e-9)
    assert grid[-1].item() == pytest.approx(sigma_min, rel=1e-9)


@settings(max_examples=15)  # the table takes a while
@given(num_steps=st.integers(2, 60), sigma_min=st.floats(0.002, 0.05), sigma_max=st.floats(10.0, 150.0))
def test_solvers_iddpm_grid_takes_its_levels_from_the_table(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    config = SamplingConfig(num_steps=num_steps, discretization="iddpm")
    grid = nl.sigma_grid(config, sigma_min, sigma_max)
    table = nl.iddpm_levels(config.C_1, config.C_2, config.M)
    allowed = table[(table >= sigma_min) & (table <= sigma_max)]
    assert torch.isin(grid, table).all() and (grid.diff() < 0).all()
    assert (grid[0], grid[-1]) == (allowed.max(), allowed.min())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplingConfig(num_steps=1), "at least 2"),
        (SamplingConfig(num_steps=900, discretization="iddpm", sigma_max=1.0), "lower --steps"),
        (SamplingConfig(sigma_min=5.0, sigma_max=5.0), "sigma-min"),
    ],
)
def test_solvers_grids_that_do_not_exist_are_refused(config: SamplingConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(Networks(Gaussian()), config)


def test_solvers_grid_stays_within_what_the_network_knows() -> None:
    net = Gaussian(sigma_min=0.02, sigma_max=50.0)
    steps = Sampler(Networks(net), SamplingConfig(num_steps=5)).steps
    assert (steps[0].sigma, steps[-1].sigma) == pytest.approx((50.0, 0.02))


@given(sigma=st.floats(1e-3, 500.0), tau=st.floats(1e-3, 1.1))
def test_solvers_vp_maps_are_each_others_inverse(sigma: float, tau: float) -> None:
    level, time = torch.tensor(sigma, dtype=torch.float64), torch.tensor(tau, dtype=torch.float64)
    assert nl.vp_sigma(nl.vp_time(level)).item() == pytest.approx(sigma, rel=1e-8)
    assert nl.vp_time(nl.vp_sigma(time)).item() == pytest.approx(tau, rel=1e-8)


@given(
    schedule=st.sampled_from(["linear", "vp", "ve"]),
    scaling=st.sampled_from(["none", "vp"]),
    sigma_min=st.floats(1e-3, 0.05),
    sigma_max=st.floats(1.0, 500.0),
    share=st.floats(0.0, 1.0),
)
def test_solvers_coordinates_are_consistent(
    schedule: str, scaling: str, sigma_min: float, sigma_max: float, share: float
) -> None:
    """sigma inverts sigma_inv, and both derivatives are the derivatives."""
    coords = nl.coordinates(SamplingConfig(schedule=schedule, scaling=scaling), sigma_min, sigma_max)
    level = torch.tensor(sigma_min ** (1 - share) * sigma_max**share, dtype=torch.float64)
    t = coords.sigma_inv(level).requires_grad_()
    assert coords.sigma(t).item() == pytest.approx(level.item(), rel=1e-8)
    for function, derivative in ((coords.sigma, coords.sigma_deriv), (coords.s, coords.s_deriv)):
        value = function(t)
        # A constant scale has no graph; its derivative is zero.
        slope = torch.autograd.grad(value, t)[0].item() if value.requires_grad else 0.0
        assert derivative(t).item() == pytest.approx(slope, rel=1e-7)


def test_solvers_vp_schedule_spans_its_levels_between_epsilon_and_one() -> None:
    coords = nl.coordinates(SamplingConfig(schedule="vp", epsilon_s=1e-3), 0.01, 120.0)
    ends = coords.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([0.01, 120.0], rel=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"solver": "rk4"},
        {"discretization": "cosine"},
        {"schedule": "edm"},
        {"scaling": "ve"},
        {"rho": 0.0},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"S_churn": -1.0},
        {"S_noise": math.nan},
    ],
)
def test_solvers_config_names_the_setting_it_refuses(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        SamplingConfig(**wrong)
