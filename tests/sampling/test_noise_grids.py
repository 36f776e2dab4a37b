"""Grids and noise levels against what papers print and closed forms, not against the code that makes them."""

import math

import pytest
import torch

from dgfast import noise_levels as nl
from dgfast.config import SamplingConfig
from dgfast.errors import UserError


def iddpm_by_hand(j: int, C_2: float = 0.008, M: int = 1000) -> float:
    """u_j, j > 0, from alpha_bar: without the clip, EDM's recursion telescopes to alpha_bar_M / alpha_bar_j - 1."""

    def alpha_bar(k: int) -> float:
        return math.sin(math.pi / 2 * k / M / (C_2 + 1)) ** 2

    return math.sqrt(alpha_bar(M) / alpha_bar(j) - 1)


def test_iddpm_levels_are_those_of_the_cosine_schedule() -> None:
    levels = nl.iddpm_levels(0.001, 0.008, 1000)
    assert len(levels) == 1001 and levels[1000] == 0
    for j in (1, 2, 10, 250, 500, 900, 990):
        assert float(levels[j]) == pytest.approx(iddpm_by_hand(j), rel=1e-4), j
    # The largest ratio of neighbours would be infinite, and is clipped: (u_0^2 + 1) C_1 = u_1^2 + 1.
    assert float(levels[0]) == pytest.approx(math.sqrt((iddpm_by_hand(1) ** 2 + 1) / 0.001 - 1), rel=1e-4)
    clipped = nl.iddpm_levels(0.5, 0.008, 1000)
    assert float(clipped[0]) == pytest.approx(math.sqrt(2 * float(clipped[1]) ** 2 + 1), rel=1e-9)
    assert float(nl.iddpm_levels(0.001, 0.1, 100)[50]) == pytest.approx(iddpm_by_hand(50, 0.1, 100), rel=1e-4)


def test_iddpm_grid_takes_levels_evenly_from_those_within_its_bounds() -> None:
    """EDM, table 1: of the levels between the bounds, the (N - 1) i / (n - 1)-th, rounded."""
    config = SamplingConfig(num_steps=7, discretization="iddpm")
    table = [iddpm_by_hand(j) for j in range(1, 1000)]
    within = [level for level in table if 0.002 <= level <= 81.0]
    picked = [within[math.floor((len(within) - 1) * i / 6 + 0.5)] for i in range(7)]
    assert nl.sigma_grid(config, 0.002, 81.0).tolist() == pytest.approx(picked, rel=1e-3)  # alpha_bar is float32


def test_iddpm_grid_of_as_many_steps_as_levels_is_all_of_them() -> None:
    levels = nl.iddpm_levels(0.001, 0.008, 1000)
    low, high = float(levels[980]), float(levels[900])  # the bounds belong to it
    assert torch.equal(nl.sigma_grid(SamplingConfig(81, discretization="iddpm"), low, high), levels[900:981])
    with pytest.raises(UserError, match="81 levels"):
        nl.sigma_grid(SamplingConfig(82, discretization="iddpm"), low, high)


def test_edm_grid_is_even_in_a_root_of_sigma() -> None:
    """EDM, equation 5."""
    first, last = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    by_hand = [(first + i / 17 * (last - first)) ** 7 for i in range(18)]
    assert nl.sigma_grid(SamplingConfig(), 0.002, 80.0).tolist() == pytest.approx(by_hand, rel=1e-9)
    assert by_hand[1:3] == pytest.approx([57.586, 40.786], rel=1e-4)  # so that no slip is in both
    two = nl.sigma_grid(SamplingConfig(3, rho=1.0), 1.0, 5.0)
    assert two.tolist() == pytest.approx([5.0, 3.0, 1.0])


def test_ve_and_vp_grids_are_those_of_their_formulas() -> None:
    ve = nl.sigma_grid(SamplingConfig(5, discretization="ve"), 0.01, 100.0)
    assert ve.tolist() == pytest.approx([100.0, 10.0, 1.0, 0.1, 0.01])
    # With the ends of the VP process itself, beta is its own: 19.9 t + 0.1.
    low, high = (math.sqrt(math.expm1(9.95 * t**2 + 0.1 * t)) for t in (1e-3, 1.0))
    vp = nl.sigma_grid(SamplingConfig(4, discretization="vp"), low, high)
    times = [1 + k / 3 * (1e-3 - 1) for k in range(4)]
    assert vp.tolist() == pytest.approx([math.sqrt(math.expm1(9.95 * t**2 + 0.1 * t)) for t in times], rel=1e-9)
    assert nl.sigma_bounds(SamplingConfig(discretization="vp"), 0.0, math.inf) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("discretization", "low", "high"), [("edm", 0.002, 80.0), ("iddpm", 0.002, 81.0), ("ve", 0.02, 100.0)]
)
def test_bounds_are_the_published_ones_within_what_the_network_knows(
    discretization: str, low: float, high: float
) -> None:
    config = SamplingConfig(discretization=discretization)
    assert nl.sigma_bounds(config, 0.0, math.inf) == (low, high)
    assert nl.sigma_bounds(config, 0.5, 7.0) == (0.5, 7.0)
    own = SamplingConfig(discretization=discretization, sigma_min=1.0, sigma_max=3.0)
    assert nl.sigma_bounds(own, 0.5, 7.0) == (1.0, 3.0)
    assert nl.sigma_bounds(own, 1.5, 2.5) == (1.5, 2.5)
    for bad in ((5.0, 5.0), (0.0, 1.0), (3.0, 2.0)):
        with pytest.raises(UserError, match="sigma-min"):
            nl.sigma_bounds(SamplingConfig(sigma_min=bad[0], sigma_max=bad[1]), 0.0, math.inf)


def test_vp_times_are_the_documented_ones() -> None:
    sigma = torch.tensor([152.17, 0.0447], dtype=torch.float64)
    assert nl.vp_time(sigma).tolist() == pytest.approx([1.0, 0.01], rel=2e-3)
    assert nl.vp_alpha(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx(
        [1.0, 0.5**0.5, 0.1**0.5]
    )
    at_zero = nl.cosine_time(torch.zeros((), dtype=torch.float64))
    assert float(at_zero) == pytest.approx(0.0, abs=1e-12)
    for t in (0.1, 0.5, 0.9):  # alpha_bar(t) = cos((t + s) / (1 + s) pi / 2)^2 / cos(s / (1 + s) pi / 2)^2
        share = math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        level = torch.tensor(math.sqrt(1 / share - 1), dtype=torch.float64)
        assert float(nl.cosine_time(level)) == pytest.approx(t, rel=1e-9)
    ends = nl.log_uniform_sigma(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([0.00100, 152.17], rel=1e-3)


def test_ddpm_levels_need_one_step_at_least() -> None:
    (only,) = nl.ddpm_levels("cosine", 1).tolist()
    assert only == pytest.approx(math.sqrt(999.0))  # beta is clipped to 0.999
    for schedule, steps in (("cosine", 0), ("linear", -1), ("quadratic", 10)):
        with pytest.raises(ValueError, match="noise_schedule"):
            nl.ddpm_levels(schedule, steps)
    with pytest.raises(ValueError, match="needs more than 20 steps"):
        nl.ddpm_levels("linear", 20)
