"""Guidance by an observation against the Gaussian posterior's closed form, and what it refuses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dgfast import Sampler, SamplingConfig, UserError
from dgfast.guidance import Mask, ObservationGuidance, guided_denoiser
from dgfast.guidance.likelihood import solved, squared_norm
from dgfast.guidance.observation import METHODS
from dgfast.networks import Networks
from tests.support.golden_posterior import Observed, Prior
from tests.support.guidance import Exact, Gaussian, batch, column, mixture, rows

CPU = torch.device("cpu")
NET = Gaussian(0.1, 0.3)


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# By hand: two correlated pixels, the first of them observed -----------------------------------------------------------
BY_HAND = Observed(
    Prior(numbers(0.2, -0.1), numbers([1.0, 0.8], [0.8, 1.0])), numbers([1.0, 0.0]), numbers(1.0), numbers(0.2)
)
LEVELS, STATES = numbers(0.5, 2.0), numbers([0.6, 0.1], [1.5, -1.0]).view(2, 1, 1, 2)
TABLE: dict[str, tuple[dict[str, Any], Any]] = {
    "exact": ({"method": "mmps"}, ([0.904118, 0.248891], [0.963724, 0.386219])),
    "likelihood": ({"gamma": 0.0}, ([2.541775, 0.785828], [12.584558, 8.915272])),
    "sda, 0.01": ({"gamma": 0.01}, ([2.422133, 0.746601], [6.449504, 4.412480])),
    "sda, 1": ({"gamma": 1.0}, ([0.788399, 0.210951], [0.435936, -0.001148])),
    "sda, 1, detached": ({"gamma": 1.0, "through_network": False}, ([0.932118, 0.118970], [0.993212, -0.090312])),
    "pigdm": ({"method": "pigdm"}, ([0.846845, 0.230113], [0.898741, 0.338525])),
}


@pytest.mark.parametrize("name", TABLE)
def test_observation_is_the_table_that_was_worked_out_by_hand(name: str) -> None:
    how, wanted = TABLE[name]
    found = BY_HAND.guided(STATES, LEVELS, **how)
    torch.testing.assert_close(found.view(2, 2), numbers(*wanted), rtol=0, atol=1e-6)


def test_observation_dps_moves_by_the_gradient_of_the_norm() -> None:
    plain = BY_HAND.prior(STATES, LEVELS, None)
    moved = BY_HAND.guided(STATES, LEVELS, method="dps", weight=0.5) - plain
    gradient = numbers([-0.661247, -0.216802], [-0.178982, -0.131363])
    torch.testing.assert_close(moved.view(2, 2), -0.5 * LEVELS[:, None] ** 2 * gradient, rtol=0, atol=1e-5)


# The posterior of any Gaussian ----------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(data=st.data())
def test_observation_by_as_many_steps_as_entries_is_the_posterior_of_any_gaussian(data: st.DataObject) -> None:
    c, h, w = (data.draw(st.integers(1, 3)) for _ in range(3))
    n = c * h * w
    m, count, seed = data.draw(st.integers(1, min(n, 4))), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g)

    factor = draw(n, n)
    prior = Prior(draw(n), factor @ factor.T / n + 0.2 * torch.eye(n, dtype=torch.float64))
    observed = Observed(prior, draw(m, n) / math.sqrt(n), draw(m), draw(m).abs() + 0.2)
    x, sigma = 2 * draw(count, c, h, w), draw(count).exp()
    posterior = observed.posterior()
    for one, level in zip(x.split(1), sigma.split(1), strict=True):  # each sample's noise level is its own
        wanted = posterior(one, level, None)
        torch.testing.assert_close(
            observed.guided(one, level, method="mmps", iterations=m), wanted, rtol=1e-6, atol=1e-7
        )
    together = observed.guided(x, sigma, method="mmps", iterations=m)
    torch.testing.assert_close(together, posterior(x, sigma, None), rtol=1e-6, atol=1e-7)


def test_observation_pigdm_is_exact_for_pixels_of_its_own_deviation() -> None:
    x, sigma = batch(3)
    net, y, where = Gaussian(0.3, 0.49), torch.rand(1, 2, 2, dtype=torch.float64), numbers([1.0, 0.0], [0.0, 1.0])[None]
    guidance = ObservationGuidance(Mask(where), y, 0.1, method="pigdm", data_std=0.7).fitted((1, 2, 2), CPU)
    found, _ = guided_denoiser(net, [guidance])(x, sigma, None)
    variance = 1 / (1 / 0.49 + 1 / 0.01)
    mean = variance * (0.3 / 0.49 + y / 0.01)
    known = (variance * x + column(sigma) ** 2 * mean) / (variance + column(sigma) ** 2)
    torch.testing.assert_close(found, torch.where(where > 0, known, net(x, sigma, None)))


def test_solver_finds_what_it_is_asked_for_and_nothing_where_nothing_is_asked() -> None:
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(3, 4, 4, dtype=torch.float64, generator=g)
    matrix, right = factor @ factor.mT + 0.1 * torch.eye(4), torch.randn(3, 4, dtype=torch.float64, generator=g)
    right[1] = 0
    found = solved(lambda v: (v, (matrix @ v[..., None])[..., 0]), right, 4)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right), rtol=1e-6, atol=1e-8)
    assert not found[1].any()


# Operators and shapes -------------------------------------------------------------------------------------------------
def pooled(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2)


def blurred(images: Tensor) -> Tensor:
    kernel = numbers(1, 4, 6, 4, 1).outer(numbers(1, 4, 6, 4, 1)).div(256).to(images)
    return F.conv2d(images, kernel.expand(images.shape[1], 1, 5, 5), padding=2, groups=images.shape[1])


@settings(max_examples=20)
@given(data=st.data())
def test_squared_norm_is_the_largest_eigenvalue(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 2)), *(2 * data.draw(st.integers(2, 3)) for _ in range(2)))
    for operator in (pooled, blurred):
        basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        largest = torch.linalg.matrix_norm(operator(basis).flatten(1), ord=2) ** 2
        assert 0.99 * largest <= squared_norm(operator, shape, CPU) <= largest * (1 + 1e-9)


def test_observation_takes_the_least_safe_gamma_and_refuses_less() -> None:
    y = torch.zeros(1, 2, 2, dtype=torch.float64)
    assert ObservationGuidance(pooled, y).fitted((1, 4, 4), CPU).gamma == pytest.approx(0.25)
    assert ObservationGuidance(Mask(torch.ones(2, 2)), y).fitted((1, 2, 2), CPU).gamma == 1.0
    kept = ObservationGuidance(pooled, y, gamma=0.25).fitted((1, 4, 4), CPU)
    assert kept.gamma == 0.25 and kept.observation.shape == (1, 1, 2, 2)
    with pytest.raises(UserError, match=r"gamma 0\.01 lets the correction overshoot.* safe for this operator is 0\.25"):
        ObservationGuidance(pooled, y, gamma=0.01).fitted((1, 4, 4), CPU)
    with pytest.raises(ValueError, match="gamma is open"):
        guided_denoiser(Gaussian(0.0, 1.0), [ObservationGuidance(lambda x: x, y)])(*batch(0), None)


def test_safe_gamma_keeps_heun_of_few_steps_where_it_belongs_and_the_published_one_does_not() -> None:
    """The derivative of D' lies between 0 and J at every noise level, for data of any width."""
    where, y = Mask(torch.ones(1, 1)), torch.zeros(1, 1, 1, dtype=torch.float64)
    safe = ObservationGuidance(where, y, 0.01).fitted((1, 1, 1), CPU)
    for variance in (0.01, 0.25, 4.0):
        net = Gaussian(0.0, variance)
        sigma = torch.logspace(-3, 2, 40, dtype=torch.float64)
        x = torch.ones(40, 1, 1, 1, dtype=torch.float64)
        slope = guided_denoiser(net, [safe])(x, sigma, None)[0]  # D' is linear in x, and 0 at 0
        assert (slope >= 0).all() and (slope <= net(x, sigma, None)).all()
    published = replace(safe, gamma=0.01)
    assert guided_denoiser(Gaussian(0.0, 4.0), [published])(x, sigma, None)[0].min() < -5


ONES = torch.ones(1, 4, 4)
ARRAY: Any = ONES.numpy()


@pytest.mark.parametrize(
    ("operator", "y", "line"),
    [
        (Mask(ONES), torch.zeros(3, 3), r"the observation has the shape \[3, 3\]; of one image \[1, 4, 4\] can be"),
        (pooled, torch.zeros(1, 4, 4), r"of one image \[1, 2, 2\] can be observed"),
        (lambda x: x @ torch.ones(3, 3), torch.zeros(1, 4, 4), r"the operator takes no images of shape \[1, 4, 4\]: "),
        (lambda x: x[0], torch.zeros(4, 4), r"must make one observation an image, \[2, ...\] of two images"),
        (lambda x: x.square(), torch.zeros(1, 4, 4), "is not linear: a loss can be anything, use LossGuidance"),
        (lambda x: x + 1, torch.zeros(1, 4, 4), "is not linear"),
        (lambda x: 0 * x, torch.zeros(1, 4, 4), "makes 0 of every image"),
        (torch.fft.fft2, torch.zeros(1, 4, 4), "makes complex numbers: return torch.view_as_real of them"),
        (lambda x: x.detach(), torch.zeros(1, 4, 4), "no gradient goes back through the operator"),
        (Mask(torch.ones(3, 5)), torch.zeros(1, 4, 4), r"the mask has the shape \[3, 5\]; give \[1, 4, 4\] or"),
        (Mask(0.5 * ONES), torch.zeros(1, 4, 4), "must have 1 for what is observed and 0 for what is not"),
        (Mask(0 * ONES), torch.zeros(1, 4, 4), "and observe something"),
        (Mask(ARRAY), torch.zeros(1, 4, 4), "the mask is a ndarray; give a tensor"),
        (pooled, torch.full((1, 2, 2), torch.nan), "no finite numbers"),
        (pooled, torch.full((1, 2, 2), 255, dtype=torch.uint8), "of torch.uint8; give a tensor of floating numbers"),
        (pooled, ARRAY, "of ndarray; give a tensor of floating numbers"),
    ],
)
def test_observation_that_does_not_fit_is_refused_in_one_line(operator: Any, y: Tensor, line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        ObservationGuidance(operator, y).fitted((1, 4, 4), CPU)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"method": "ddrm"}, "is not one of sda"), ({"method": "tmpd", "through_network": False}, "Jacobian"),
        ({"iterations": 0}, "1 to 50"), ({"iterations": 51, "method": "mmps"}, "1 to 50"),
        ({"iterations": 2}, "iterations are of mmps and pigdm; sda solves nothing"),
        ({"method": "dps", "gamma": 1.0}, "gamma is of sda and tmpd; dps has none"), ({"gamma": math.nan}, "gamma nan"),
        ({"std": -0.1}, "std -0.1 must be a finite number, at least 0"), ({"weight": math.inf}, "weight inf must be"),
        ({"std": "0.1"}, "std '0.1' must be"), ({"data_std": 0.0}, "data_std 0.0 must be"),
        ({"std": torch.ones(3)}, r"std has the shape \[3\]; give a number, or one an entry of \[1, 4, 4\]"),
        ({"std": -ONES}, "std must be finite and at least 0"),
    ],
)  # fmt: skip
def test_observation_options_that_mean_nothing_are_refused(how: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        ObservationGuidance(Mask(ONES), ONES, **how).fitted((1, 4, 4), CPU)


def test_observation_of_a_mask_a_sample_guides_each_by_its_own() -> None:
    """Beside one observation for all; the network's images are of two channels, and masks of both or of each."""
    g = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=g), numbers(0.3, 1.0, 5.0)
    y, net = torch.rand(2, 2, 2, dtype=torch.float64, generator=g), Gaussian(0.1, 0.3)

    def denoised(where: Tensor, rows: slice) -> Tensor:
        fitted = ObservationGuidance(Mask(where), y).fitted((2, 2, 2), CPU)
        return guided_denoiser(net, [fitted])(x[rows], sigma[rows], None)[0]

    for shape in ((3, 1, 2, 2), (3, 2, 2, 2)):
        where = (torch.rand(shape, generator=g) > 0.4).double()
        where[:, :, 0, 0] = 1
        together = denoised(where, slice(None))
        for k in range(3):
            torch.testing.assert_close(denoised(where[k], slice(k, k + 1)), together[k : k + 1])
    with pytest.raises(UserError, match="the mask is one a sample, of 3 images; of these 2 it is not"):
        denoised(where, slice(2))


def test_tmpd_takes_no_negative_row_sum_for_a_variance() -> None:
    """Of two pixels, one of which is what the other one is not, sigma^2 J 1 is below 0 at the smaller one."""
    prior, ones, y = Prior(numbers(0.0, 0.0), numbers([1.0, -0.7], [-0.7, 0.5])), torch.ones(1, 1, 2), numbers(0.3, 0.3)
    x, sigma = numbers([0.5, -0.2], [4.0, -3.0]).view(2, 1, 1, 2), numbers(0.5, 20.0)
    guidance = ObservationGuidance(Mask(ones), y.view(1, 1, 2), 0.05, method="tmpd").fitted((1, 1, 2), CPU)
    moved = (guided_denoiser(prior, [guidance])(x, sigma, None)[0] - prior(x, sigma, None)).view(2, 2)
    for k, level in enumerate(sigma):
        jacobian = prior.jacobian(level)
        spread = jacobian.sum(1)
        assert spread[0] > 0 > spread[1]
        innovation = y - prior(x[k : k + 1], level[None], None).view(2)
        weighted = innovation / (0.0025 + level**2 * torch.where(spread > 0, spread, 1.0))
        torch.testing.assert_close(moved[k], level**2 * jacobian @ weighted)


@pytest.mark.parametrize("method", METHODS)
def test_observation_without_noise_of_some_pixels_is_finite(method: str) -> None:
    x, sigma = batch(7, size=4)
    where, y = numbers([1.0, 0.0], [0.0, 1.0]), torch.full((1, 2, 2), 0.4, dtype=torch.float64)
    guidance = ObservationGuidance(Mask(where), y, 0.0, method=method).fitted((1, 2, 2), CPU)
    denoised, plain = guided_denoiser(NET, [guidance])(x, sigma, None)[0], NET(x, sigma, None)
    assert denoised.isfinite().all()
    off = where.expand_as(x) == 0
    torch.testing.assert_close(denoised[off], plain[off])  # the pixels are independent
    assert ((denoised - 0.4).abs() < (plain - 0.4).abs() + 1e-12)[~off].all() or method == "dps"


def test_observation_of_one_sample_each_guides_each_by_its_own() -> None:
    x, sigma = batch(5, size=3)
    y = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 1, 2, 2)
    net, mask = Gaussian(0.1, 0.3), Mask(torch.ones(2, 2))
    together = guided_denoiser(net, [ObservationGuidance(mask, y).fitted((1, 2, 2), CPU)])(x, sigma, None)[0]
    for k in range(3):
        alone = ObservationGuidance(mask, y[k]).fitted((1, 2, 2), CPU)
        one = guided_denoiser(net, [alone])(x[k : k + 1], sigma[k : k + 1], None)[0]
        torch.testing.assert_close(one, together[k : k + 1])
    with pytest.raises(UserError, match="of these 2 images"):
        guided_denoiser(net, [ObservationGuidance(mask, y, gamma=1.0)])(x[:2], sigma[:2], None)


# In a sampler ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "costs"),
    [
        ({}, (11, 0)), ({"method": "tmpd"}, (22, 0)), ({"method": "mmps", "iterations": 3}, (33, 0)),
        ({"through_network": False}, (0, 11)), ({"weight": 0.0}, (0, 0)),
    ],
)  # fmt: skip
def test_observation_costs_what_it_says_and_of_weight_nothing_it_is_nothing(how: Any, costs: tuple[int, int]) -> None:
    networks, sampling = Networks(Exact(mixture)), SamplingConfig(num_steps=6, sigma_max=20.0, sigma_min=0.05)
    y = torch.full((1, 1, 1), 0.6, dtype=torch.float64)
    sampler = Sampler(networks, sampling, [ObservationGuidance(Mask(torch.ones(1, 1)), y, **how)])
    assert (sampler.score_backwards, sampler.guidance_gradients) == costs
    latents = batch(0)[0][:, :, :1, :1]
    drawn, plain = (s.integrate(latents, rows(0, 6)) for s in (sampler, Sampler(networks, sampling)))
    assert torch.equal(drawn, plain) == (how == {"weight": 0.0})
    if how != {"weight": 0.0}:
        assert (drawn - 0.6).abs().mean() < (plain - 0.6).abs().mean()
