"""Guidance reuse: exact where the gradient is what the rule says it is, of the right order elsewhere, and accounted."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.guidance import (
    CarriedGradient,
    ClassifierGuidance,
    DiscriminatorGuidance,
    gradient_keeping_denoiser,
    guided_denoiser,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
NO_WINDOW = (0.0, 2.0)  # every noise level in use
PULL = 0.01  # 0.01 x at sigma 80 stays inside the discriminator's clamp of +-11.5


class Gaussian:
    """The perfect denoiser of independent pixels with this mean and variance."""

    label_dim, img_channels, img_resolution, sigma_min, sigma_max = 0, 1, 1, 0.0, math.inf

    def __init__(self, mean: float, variance: float, label_dim: int = 0) -> None:
        self.mean, self.variance, self.label_dim = mean, variance, label_dim

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        noise = sigma.view(-1, 1, 1, 1) ** 2
        return (self.variance * x + noise * self.mean) / (self.variance + noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def log_density(self, u: Tensor, sigma: Tensor) -> Tensor:
        alpha = nl.vp_alpha(sigma).view(-1, 1, 1, 1)
        variance = alpha**2 * (self.variance + sigma.view(-1, 1, 1, 1) ** 2)
        return -0.5 * ((u.double() - alpha * self.mean) ** 2 / variance + variance.log()).sum(dim=(1, 2, 3))


DATA, MODEL = Gaussian(0.3, 0.25), Gaussian(0.0, 0.36)


class Counting:
    """A network that counts its calls."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net, self.calls = net, 0

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls += 1
        return self.net(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


def exact_discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The log-ratio of DATA to MODEL."""
    sigma = nl.vp_sigma(t)
    return DATA.log_density(u, sigma) - MODEL.log_density(u, sigma)


def straight_discriminator(slope: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The one whose gradient in x is `slope(sigma)` in every pixel, at every x."""

    def discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        sigma = nl.vp_sigma(t)
        return slope(sigma) / nl.vp_alpha(sigma) * u.double().sum(dim=(1, 2, 3))

    return discriminator


CONSTANT = straight_discriminator(lambda sigma: torch.full_like(sigma, PULL))


def unit_noise(count: int, seed: int, pixels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, pixels, pixels, dtype=torch.float64, generator=generator)


def relative_error(mine: Tensor, reference: Tensor) -> float:
    return ((mine - reference).abs().max() / reference.abs().max()).item()


# Laws -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("every", [2, 3, 1000])
@pytest.mark.parametrize(
    ("solver", "options"),
    [("heun", {}), ("heun", {"schedule": "vp", "scaling": "vp", "alpha": 0.6}), ("euler", {}), ("dpmpp-2m", {})],
    ids=["heun", "heun, scaled", "euler", "dpmpp-2m"],
)
def test_reuse_of_a_constant_gradient_is_exact(solver: str, options: dict[str, Any], every: int, reuse: str) -> None:
    """Whatever the weights at the two points: what is carried over is the gradient without its weight."""
    config = SamplingConfig(num_steps=12, solver=solver, **options)
    weights: dict[str, Any] = {"dg_weight": 1.5, "dg_weight_2nd": 0.7, "dg_window": NO_WINDOW}
    networks, start = Networks(MODEL, discriminator=CONSTANT), unit_noise(5, seed=0)
    plain = Sampler(networks, config, GuidanceConfig(**weights)).integrate(start)
    reused = Sampler(networks, config, GuidanceConfig(**weights, dg_every=every, dg_reuse=reuse))
    assert relative_error(reused.integrate(start), plain) < 1e-6  # gradients are float32
    assert relative_error(Sampler(networks, config).integrate(start), plain) > 1e-3


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("edge", ["upper", "lower"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_reuse_of_a_constant_gradient_is_exact_where_churn_crosses_the_windows_edge(
    alpha: float, edge: str, every: int
) -> None:
    """A call that the plan guides and the window then leaves alone neither takes nor gives a gradient."""
    config = SamplingConfig(num_steps=12, S_churn=4.0, alpha=alpha)
    networks, start, noises = Networks(MODEL, discriminator=CONSTANT), unit_noise(5, seed=1), unit_noise(60, seed=2)
    crossing = Sampler(networks, config).steps[4]
    tau = nl.vp_time(torch.tensor(crossing.sigma * (1 + 0.5 * crossing.gamma), dtype=torch.float64)).item()
    window = (tau, 2.0) if edge == "lower" else (0.0, tau)
    images = []
    for k in (1, every):
        guidance = GuidanceConfig(dg_weight=1.5, dg_weight_2nd=0.7, dg_window=window, dg_every=k)
        images.append(Sampler(networks, config, guidance).integrate(start, noise=iter(noises.split(5)).__next__))
    assert relative_error(images[1], images[0]) < 1e-6


def test_reuse_linear_is_exact_where_the_gradient_is_a_line_in_log_sigma() -> None:
    def gradient(sigma: Tensor) -> Tensor:
        return (0.3 - 0.2 * sigma.log()).view(-1, 1, 1, 1) * torch.tensor([1.0, -2.0]).view(1, 1, 1, 2)

    levels = torch.tensor([[40.0, 8.0], [9.0, 3.0], [5.0, 0.5], [0.01, 0.02]], dtype=torch.float64)  # two samples each
    for reuse in ("hold", "linear"):
        carried = CarriedGradient(reuse)
        for sigma in levels[:2]:
            carried.keep(sigma, gradient(sigma))
        for sigma in levels[1:]:  # where the last one was computed, between steps, far on
            exact = 2.5 * sigma.view(-1, 1, 1, 1) ** 2 * gradient(sigma)
            correction = carried.correction(sigma, 2.5)
            if reuse == "linear" or sigma is levels[1]:
                torch.testing.assert_close(correction, exact)
        held = 2.5 * levels[3].view(-1, 1, 1, 1) ** 2 * gradient(levels[1])
        assert torch.allclose(carried.correction(levels[3], 2.5), held) == (reuse == "hold")


def test_reuse_linear_goes_by_the_last_two_gradients_and_holds_the_first() -> None:
    carried, sigmas = CarriedGradient("linear"), torch.tensor([[32.0], [16.0], [8.0], [4.0]], dtype=torch.float64)
    gradients = [torch.full((1, 1, 1, 1), value) for value in (100.0, 1.0, 3.0)]
    carried.keep(sigmas[0], gradients[0])
    assert carried.correction(sigmas[1], 1.0).item() == pytest.approx(100 * 16**2)
    carried.keep(sigmas[1], gradients[1])
    carried.keep(sigmas[2], gradients[2])
    assert carried.correction(sigmas[3], 1.0).item() == pytest.approx(5 * 4**2)  # 1, 3, 5 at 16, 8, 4


def test_reuse_linear_holds_where_the_last_two_are_at_one_noise_level() -> None:
    carried, sigma = CarriedGradient("linear"), torch.tensor([2.0, 3.0], dtype=torch.float64)
    carried.keep(sigma, torch.full((2, 1, 1, 1), 5.0))
    carried.keep(sigma * torch.tensor([1.0, 0.5]), torch.full((2, 1, 1, 1), 7.0))
    correction = carried.correction(sigma * torch.tensor([0.5, 0.25]), 1.0).flatten()
    assert correction.tolist() == pytest.approx([7.0 * 1.0**2, 9.0 * 0.75**2])


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m"])
@pytest.mark.parametrize(("reuse", "order"), [("hold", 1), ("linear", 2)])
def test_reuse_converges_with_the_order_of_its_rule(solver: str, reuse: str, order: int) -> None:
    """Under the exact discriminator of two Gaussians, and toward the same solver's samples without reuse."""
    networks, start = Networks(MODEL, discriminator=exact_discriminator), unit_noise(16, seed=3)
    errors = []
    for count in (64, 128):
        config = SamplingConfig(num_steps=count, solver=solver)
        weights: dict[str, Any] = {"dg_weight": 1.0, "dg_weight_2nd": 1.0, "dg_window": NO_WINDOW}
        plain = Sampler(networks, config, GuidanceConfig(**weights)).integrate(start)
        reused = Sampler(networks, config, GuidanceConfig(**weights, dg_every=2, dg_reuse=reuse)).integrate(start)
        errors.append((reused - plain).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("every", [2, 3])
def test_reuse_linear_is_nearer_than_hold(solver: str, every: int) -> None:
    networks, start = Networks(MODEL, discriminator=exact_discriminator), unit_noise(16, seed=4)
    config = SamplingConfig(num_steps=24, solver=solver)
    weights: dict[str, Any] = {"dg_weight": 1.0, "dg_weight_2nd": 1.0, "dg_window": NO_WINDOW}
    plain = Sampler(networks, config, GuidanceConfig(**weights)).integrate(start)
    hold, linear = (
        (Sampler(networks, config, GuidanceConfig(**weights, dg_every=every, dg_reuse=reuse)).integrate(start) - plain)
        for reuse in ("hold", "linear")
    )
    assert linear.abs().max() < 0.8 * hold.abs().max() and linear.square().mean() < 0.8 * hold.square().mean()


# The same, written down twice -----------------------------------------------------------------------------------------
def reusing_sampler(
    net: Any, discriminator: Any, start: Tensor, sigmas: list[float], every: int, reuse: str, weights: tuple[float, ...]
) -> Tensor:
    """Heun's method under reused guidance in plain words: one loop, one counter, floats for the noise levels."""
    x, calls = start * sigmas[0], 0
    computed_at: list[tuple[float, Tensor]] = []  # noise level and gradient

    def slope(x: Tensor, level: float, weight: float) -> Tensor:
        nonlocal calls
        sigma = torch.full((len(x),), level, dtype=torch.float64)
        computed = calls % every == 0
        if computed:
            alpha = (1 + level**2) ** -0.5
            u = (alpha * x).float().requires_grad_()
            with torch.enable_grad():
                logit = discriminator(u, nl.vp_time(sigma), None).sum()
            computed_at.append((level, alpha * torch.autograd.grad(logit, u)[0].double()))
        calls += 1
        last_level, g = computed_at[-1]
        if reuse == "linear" and len(computed_at) > 1 and not computed:
            earlier_level, earlier = computed_at[-2]
            rise = (g - earlier) / (math.log(last_level) - math.log(earlier_level))
            g = g + rise * (math.log(level) - math.log(last_level))
        return (x - net(x, sigma, None)) / level - weight * level * g

    for sigma, following in pairwise([*sigmas, 0.0]):
        d = slope(x, sigma, weights[0])
        end = x + (following - sigma) * d
        if following:
            end = x + (following - sigma) * (d + slope(end, following, weights[1])) / 2
        x = end
    return x


@torch.no_grad()
@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_reuse_equals_the_plain_loop(
    tiny_net: NetFactory, tiny_discriminator: NetFactory, every: int, reuse: str
) -> None:
    net, discriminator, start = tiny_net(), tiny_discriminator(), unit_noise(2, seed=5, pixels=8)
    guidance = GuidanceConfig(2.0, 0.5, dg_window=NO_WINDOW, dg_every=every, dg_reuse=reuse)
    sampler = Sampler(Networks(net, discriminator), SamplingConfig(num_steps=6), guidance)
    levels = [step.sigma for step in sampler.steps]
    by_hand = reusing_sampler(net, discriminator, start, levels, every, reuse, (2.0, 0.5))
    images = sampler.integrate(start)
    assert relative_error(images, by_hand) < 1e-5
    plain = Sampler(Networks(net, discriminator), SamplingConfig(num_steps=6), GuidanceConfig(2.0, 0.5, NO_WINDOW))
    if every == 1:  # whatever the rule: nothing is carried over
        assert torch.equal(images, plain.integrate(start))
    else:
        assert relative_error(images, plain.integrate(start)) > 1e-3


@torch.no_grad()
def test_reuse_keeps_the_gradient_with_respect_to_x_and_changes_nothing_else(
    tiny_net: NetFactory, tiny_discriminator: NetFactory
) -> None:
    net, discriminator = tiny_net(label_dim=4), tiny_discriminator(num_classes=4)
    x, sigma = 3 * unit_noise(4, seed=6, pixels=8), torch.tensor([0.05, 0.7, 4.0, 60.0], dtype=torch.float64)
    labels = F.one_hot(torch.tensor([0, 1, 2, 3]), 4).float()
    guidance = DiscriminatorGuidance(discriminator, 2.5, NO_WINDOW)
    other = ClassifierGuidance(lambda u, t: u.flatten(1)[:, :4].tanh(), 3.0)
    denoised, log_ratio, gradient = gradient_keeping_denoiser(net, [other], guidance)(x, sigma, labels)
    plain, plain_ratio = guided_denoiser(net, [other, guidance])(x, sigma, labels)
    assert torch.equal(denoised, plain) and torch.equal(log_ratio, plain_ratio)
    assert denoised.dtype == torch.float64 and gradient.dtype == torch.float32
    level = sigma.view(-1, 1, 1, 1)
    without, _ = guided_denoiser(net, [other])(x, sigma, labels)
    for mine, exact in zip(gradient, (plain - without) / (2.5 * level**2), strict=True):
        assert relative_error(mine, exact) < 1e-4 and exact.abs().max() > 0


# Accounts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 2, 3, 4, 100])
@pytest.mark.parametrize(
    ("solver", "weights", "guided"),
    [("heun", (1.0, 1.0), 17), ("heun", (1.0, 0.0), 9), ("heun", (0.0, 1.0), 8), ("dpmpp-2m", (1.0, 1.0), 9)],
)
def test_reuse_counts_the_gradients_that_it_computes(
    tiny_net: NetFactory, solver: str, weights: tuple[float, float], guided: int, every: int
) -> None:
    score, discriminator = Counting(tiny_net(label_dim=3)), Counting(CONSTANT)
    classifier = Counting(lambda u, t: u.flatten(1)[:, :3])
    config = SamplingConfig(num_steps=9, solver=solver)
    guidance = GuidanceConfig(*weights, NO_WINDOW, dg_every=every, dg_reuse="linear", classifier_scale=1.0)
    sampler = Sampler(Networks(score, discriminator, classifier), config, guidance)
    sampler([1, 2])
    assert discriminator.calls == math.ceil(guided / every)
    assert classifier.calls == score.calls == config.score_evaluations == sampler.score_evaluations
    assert sampler.guidance_gradients == discriminator.calls + classifier.calls


def test_reuse_begins_with_a_computed_gradient_and_ends_with_the_window(tiny_net: NetFactory) -> None:
    """Nothing is carried into calls outside of the window, and each run starts afresh."""
    window = (0.1, 0.6)
    config = SamplingConfig(num_steps=12)
    guidance = GuidanceConfig(1.0, 1.0, window, dg_every=3)
    sampler = Sampler(Networks(MODEL, discriminator=CONSTANT), config, guidance)
    plain = Sampler(Networks(MODEL, discriminator=CONSTANT), config, GuidanceConfig(1.0, 1.0, window))
    calls = (
        [(bool(s.predictor), bool(s.carried[0])) for s in sampler.steps],
        [(bool(s.corrector), bool(s.carried[1])) for s in sampler.steps if s.corrector is not None],
    )
    guided = (
        [bool(s.predictor) for s in plain.steps],
        [bool(s.corrector) for s in plain.steps if s.corrector is not None],
    )
    for reusing, usual in zip(calls, guided, strict=True):
        assert [computed or carried for computed, carried in reusing] == usual and not all(usual) and any(usual)
        assert not any(computed and carried for computed, carried in reusing)
    start = unit_noise(3, seed=7)
    first = sampler.integrate(start)
    assert torch.equal(sampler.integrate(start), first)
    assert relative_error(first, plain.integrate(start)) < 1e-6


# Together with everything else ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m"])
def test_reuse_through_a_runtime_is_the_same_and_is_built_by_prepare(
    tiny_net: NetFactory, tiny_discriminator: NetFactory, solver: str
) -> None:
    built: list[int] = []  # of each function, the number of its results

    def runtime(function: Function, example: Sequence[Tensor | None]) -> Function:
        shapes = [None if x is None else x.shape for x in example]
        built.append(len(function(*example)))

        def run(*arguments: Tensor | None) -> Any:
            assert [None if x is None else x.shape for x in arguments] == shapes
            return function(*arguments)

        return run

    networks = Networks(tiny_net(label_dim=4), tiny_discriminator(num_classes=4), lambda u, t: u.flatten(1)[:, :4])
    guidance = GuidanceConfig(1.0, 0.5, (0.1, 0.9), dg_every=2, dg_reuse="linear", classifier_scale=2.0, cfg_scale=1.5)
    config = SamplingConfig(num_steps=6, solver=solver)
    sampler = Sampler(networks, config, guidance, runtime=runtime)
    sampler.prepare(3)
    calls = {g for step in sampler.steps for g in (step.predictor, step.corrector) if g is not None}
    keeping = [call for call in calls if any(isinstance(guidance, DiscriminatorGuidance) for guidance in call)]
    assert sorted(built) == [2] * (len(calls) - len(keeping)) + [3] * len(keeping) and 0 < len(keeping) < len(calls)
    assert torch.equal(sampler([1, 2, 3]), Sampler(networks, config, guidance)([1, 2, 3]))
    assert len(built) == len(calls)


def test_reuse_under_churn_draws_each_image_from_its_seed_alone(
    tiny_net: NetFactory, tiny_discriminator: NetFactory
) -> None:
    guidance = GuidanceConfig(1.0, 0.5, dg_every=3, dg_reuse="linear")
    networks = Networks(tiny_net(), tiny_discriminator())
    sampler = Sampler(networks, SamplingConfig(num_steps=6, S_churn=3.0), guidance)
    together = sampler([5, 6, 7])
    assert (together[0] - together[1]).abs().max() > 0.1
    assert (sampler([7])[0] - together[2]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dg_every": 0}, "dg_every 0 must be a whole number, at least 1"),
        ({"dg_every": -2}, "dg_every -2 must be"),
        ({"dg_every": 2.0}, "dg_every 2.0 must be"),
        ({"dg_reuse": "cubic"}, "dg_reuse 'cubic' is not one of hold, linear"),
        ({"dg_every": 2, "boosting": True}, "boosting .* does not go with dg_every above 1"),
    ],
)
def test_reuse_refuses_what_makes_no_sense_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GuidanceConfig(dg_weight=1.0, **wrong)
    assert "\n" not in str(error.value)
