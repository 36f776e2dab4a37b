"""Laws of flow matching, on Gaussian data: velocity, flow and distributions along every path in closed form."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond
from dgfast.errors import UserError
from dgfast.flow import PATHS, Path
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    DiscriminatorGuidance,
    Guidance,
    Repair,
    guided_denoiser,
    guided_velocity,
    of_velocities,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers import DIFFUSIONS, ddim_step

MEAN, VARIANCE = 0.3, 0.25
LEVELS = [0.002, 0.3, 1.0, 20.0, 80.0]


class Gaussian(nn.Module):
    """What a perfect network says of pixels with this mean and variance, of class 1 with twice the mean."""

    def __init__(self, path: Path, prediction: str) -> None:
        super().__init__()
        self.path, self.prediction, self.null_class = path, prediction, 2
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = t.double().view(-1, 1, 1, 1)
        mean = MEAN * (1.0 if labels is None else 1.0 + (labels == 1).double().view(-1, 1, 1, 1))
        s, spread = self.path.s(t), self.path.spread(t)
        away = (x - s * mean) / (s**2 * VARIANCE + spread**2)
        noise, clean = spread * away, mean + s * VARIANCE * away
        velocity = self.path.s_deriv(t) * clean + self.path.spread_deriv(t) * noise
        return {"velocity": velocity, "noise": noise, "score": -away}[self.prediction]


def net_of(path: str = "linear", prediction: str = "velocity", label_dim: int = 0) -> FlowPrecond:
    net = FlowPrecond(Gaussian(PATHS[path], prediction), 1, 1, label_dim, path=path, prediction=prediction)
    return net.eval().requires_grad_(False)


def unit(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_flow_network_is_the_exact_denoiser_whatever_it_predicts(path: str, prediction: str) -> None:
    net, sigma = net_of(path, prediction), torch.tensor(LEVELS, dtype=torch.float64)
    level = sigma.view(-1, 1, 1, 1)
    y = MEAN + (VARIANCE + level**2).sqrt() * unit(len(LEVELS))
    exact = (VARIANCE * y + level**2 * MEAN) / (VARIANCE + level**2)
    torch.testing.assert_close(net(y, sigma).double(), exact, rtol=1e-5, atol=1e-5)
    t = net.path.sigma_inv(level)
    velocity = net.velocity(net.path.s(t) * y, sigma).double()
    torch.testing.assert_close(net.path.clean(net.path.s(t) * y, velocity, t), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_flow_paths_are_coordinates_with_the_derivatives_that_they_say(path: str) -> None:
    one, t = PATHS[path], torch.linspace(0.01, 0.99, 9, dtype=torch.float64, requires_grad=True)
    for function, derivative in ((one.s, one.s_deriv), (one.spread, one.spread_deriv), (one.sigma, one.sigma_deriv)):
        (slope,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), slope, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one.sigma_inv(one.sigma(t)), t, rtol=1e-10, atol=1e-12)
    if one.begins_in_noise:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert torch.equal(one.sigma_inv(one.sigma(ends)), ends) and float(one.sigma(ends)[0]) == math.inf


@pytest.mark.parametrize(("solver", "order"), [("flow-euler", 1), ("flow-heun", 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_flow_solvers_converge_with_their_order(path: str, solver: str, order: int) -> None:
    z, counts = unit(16), [8, 16, 32, 64]
    exact = MEAN + VARIANCE**0.5 * z
    errors = []
    for steps in counts:
        sampler = Sampler(Networks(net_of(path)), SamplingConfig(solver=solver, num_steps=steps))
        errors.append(float((sampler.integrate(z) - exact).abs().max()))
        assert sampler.score_evaluations == order * steps == sampler.sampling.score_evaluations
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    assert -slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_flow_solvers_reach_the_images_of_the_exact_flow(path: str, prediction: str) -> None:
    """As near as the ends of their interval let them."""
    z, config = unit(16), SamplingConfig(solver="flow-heun", num_steps=128)
    images = Sampler(Networks(net_of(path, prediction)), config).integrate(z)
    torch.testing.assert_close(images, MEAN + VARIANCE**0.5 * z, rtol=0.01, atol=0.01)


def test_flow_euler_is_eulers_step_in_sigma() -> None:
    path, x, velocity = PATHS["linear"], unit(5, 1), unit(5, 2)
    t = torch.linspace(0.01, 0.9, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    t_next = t + 0.08
    levels = path.sigma(t), path.sigma(t_next)
    in_sigma = ddim_step(x / t, path.clean(x, velocity, t), *levels, None, 0.0)
    torch.testing.assert_close(t_next * in_sigma, x + (t_next - t) * velocity, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["flow-euler", "flow-heun"])
def test_flow_reverse_finds_the_noise_of_images(solver: str) -> None:
    z, networks = unit(8), Networks(net_of())
    there = Sampler(networks, SamplingConfig(solver=solver, num_steps=64))
    back = Sampler(networks, SamplingConfig(solver=solver, num_steps=64, reverse=True))
    assert [step.t for step in back.steps] == [step.t_next for step in reversed(there.steps)]
    assert (back.integrate(there.integrate(z)) - z).abs().max() < {"flow-euler": 0.1, "flow-heun": 1e-3}[solver]
    with pytest.raises(UserError, match="reverse goes from images to noise"):
        back([0])


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie", "none"])
@pytest.mark.parametrize("form", [form for form in DIFFUSIONS if form != "sbdm"])
def test_flow_sde_draws_the_same_distribution_with_any_noise(form: str, last_step: str) -> None:
    count = 4000
    config = SamplingConfig(solver="flow-sde", num_steps=64, diffusion=form, last_step=last_step, last_size=0.02)
    sampler = Sampler(Networks(net_of()), config)
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, count, 1, 1, 1, dtype=torch.float64, generator=generator)
    z = unit(count)
    images = sampler.integrate(z, noise=draw)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert images.std().item() == pytest.approx(VARIANCE**0.5, rel=0.08)
    plain = Sampler(Networks(net_of()), SamplingConfig(solver="flow-euler", num_steps=64)).integrate(z)
    assert (images - plain).abs().mean() > 0.1, "it adds no noise"


def test_flow_sde_takes_the_noise_of_noising_where_a_path_begins_finite() -> None:
    config = SamplingConfig(solver="flow-sde", num_steps=400, diffusion="sbdm", last_size=0.01)
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, 4000, 1, 1, 1, dtype=torch.float64, generator=generator)
    images = Sampler(Networks(net_of("vp")), config).integrate(unit(4000), noise=draw)
    assert (images.mean().item(), images.std().item()) == pytest.approx((MEAN, VARIANCE**0.5), abs=0.03)


def test_flow_sde_without_noise_is_eulers_method() -> None:
    z = unit(4)
    config = SamplingConfig(solver="flow-sde", num_steps=9, diffusion_norm=0.0, last_step="none")
    quiet = Sampler(Networks(net_of()), config).integrate(z, noise=partial(unit, 4))
    euler = Sampler(Networks(net_of()), SamplingConfig(solver="flow-euler", num_steps=9)).integrate(z)
    torch.testing.assert_close(quiet, euler, rtol=1e-12, atol=1e-12)


# Guidance -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Slope:
    """A discriminator of the gradient `rise` at every u."""

    rise: float = 0.7

    def __call__(self, u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.rise * u.sum(dim=(1, 2, 3))


def test_flow_gradient_guidance_is_a_change_of_velocity_that_stays_finite() -> None:
    """v' = v + w ((1 - t) / t) grad_x l, with u = x / sqrt(t^2 + (1 - t)^2); nothing at both ends of the path."""
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    net, x = net_of(), unit(5)
    guidance = DiscriminatorGuidance(Slope(), weight=2.0, window=(0.0, math.inf))
    plain, _ = guided_velocity(net, [])(x, net.path.sigma(t), None)
    guided, log_ratio = guided_velocity(net, [guidance])(x, net.path.sigma(t), None)
    change = 2.0 * (1 - t) / t * 0.7 / (t**2 + (1 - t) ** 2).sqrt()
    exact = torch.where((t > 0) & (t < 1), change, 0.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(guided - plain, exact.expand_as(x), rtol=1e-5, atol=1e-6)
    assert log_ratio.isfinite().all() and log_ratio[0] == 1e7 == log_ratio[-1]


@dataclass(frozen=True, eq=False)
class Pull(Guidance):
    """Toward 0 by half the squared denoised image, through the network."""

    weight: float = 0.4
    backwards = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return True

    def correct(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor) -> Any:
        (gradient,) = torch.autograd.grad((denoised**2 / 2).sum(), x)
        return -gradient, self.weight * sigma**2, None


@dataclass(frozen=True, eq=False)
class Brighter(Guidance):
    """D' = D + 1/4."""

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return True

    def correct(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor) -> Any:
        return torch.ones_like(denoised), 0.25 * torch.ones_like(sigma), None


@dataclass(frozen=True, eq=False)
class Halved(Repair):
    """Takes back half of what was mixed."""

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return True

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        return (mixed + plain) / 2


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_flow_guided_velocity_is_that_of_the_guided_denoiser(path: str) -> None:
    """Whatever the guidances, in the middle of the path; with both its ends, all is finite."""
    net, labels = net_of(path, label_dim=2), torch.eye(2)[[0, 1, 0, 1]]
    discriminator = DiscriminatorGuidance(Slope(), weight=2.0, window=(0.0, math.inf))
    kinds = [ClassifierFreeGuidance(net, 3.0), discriminator, Pull(), Brighter(), Halved()]
    sigma = torch.tensor([30.0, 2.0, 0.5, 0.01], dtype=torch.float64)
    image = sigma.view(-1, 1, 1, 1) * unit(4) + 0.2
    t = net.path.sigma_inv(sigma).view(-1, 1, 1, 1)
    for guidances in ([kind] for kind in kinds), [kinds]:
        for chosen in guidances:
            along = guided_velocity(net, [of_velocities(guidance, net) for guidance in chosen])
            velocity, log_ratio = along(net.path.s(t) * image, sigma, labels)
            denoised, ratio = guided_denoiser(net, chosen)(image, sigma, labels)
            found = net.path.clean(net.path.s(t) * image, velocity, t)
            torch.testing.assert_close(found, denoised, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(log_ratio, ratio, rtol=1e-4, atol=1e-4)
            ends = net.path.sigma(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
            if path != "vp":  # whose velocity is infinite at t = 1
                assert all(result.isfinite().all() for result in along(unit(4), ends, labels))


def test_flow_takes_guidances_from_outside() -> None:
    config, z = SamplingConfig(solver="flow-heun", num_steps=8), unit(4)
    net = net_of(label_dim=2)
    asked = Sampler(Networks(net), config, GuidanceConfig(cfg_scale=2.0)).integrate(z, torch.eye(2)[[0, 1, 0, 1]])
    given = Sampler(Networks(net), config, [ClassifierFreeGuidance(net, 2.0)]).integrate(z, torch.eye(2)[[0, 1, 0, 1]])
    assert torch.equal(asked, given)
    brighter = Sampler(Networks(net_of()), config, [Brighter()])
    assert [bool(step.predictor) for step in brighter.steps] == [False] + 7 * [True]  # nothing is seen at the beginning
    assert brighter.integrate(z).mean() > Sampler(Networks(net_of()), config).integrate(z).mean() + 0.1
    with pytest.raises(UserError, match="needs a network of flow matching on the same path, linear"):
        Sampler(Networks(net), config, [ClassifierFreeGuidance(lambda x, sigma, labels: x, 2.0)])


def test_flow_gradients_are_not_taken_where_they_say_nothing() -> None:
    networks = Networks(net_of(), discriminator=Slope())
    guidance = GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0, dg_window=(0.0, 1e9))
    sampler = Sampler(networks, SamplingConfig(solver="flow-heun", num_steps=4), guidance)
    assert sampler.guidance_gradients == 6 and sampler.integrate(unit(3)).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_flow_classifier_free_guidance_mixes_velocities_at_both_ends_too(path: str) -> None:
    net, labels = net_of(path, label_dim=2), torch.eye(2)
    sampler = Sampler(Networks(net), SamplingConfig(solver="flow-heun", num_steps=4), GuidanceConfig(cfg_scale=3.0))
    assert sampler.score_evaluations == 16
    (guidance,) = sampler.steps[0].predictor
    assert isinstance(guidance, ClassifierFreeGuidance)
    ends = torch.tensor(net.path.interval("velocity"), dtype=torch.float64)
    sigma, x = net.path.sigma(ends), unit(2)
    guided, _ = guided_velocity(net, [guidance])(x, sigma, labels)
    conditional, unconditional = (net.velocity(x, sigma, known).double() for known in (labels, None))
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-6, atol=1e-6)
    assert guided.isfinite().all()


def test_flow_guidance_interval_is_one_of_noise_levels() -> None:
    net = net_of(label_dim=2)
    config = SamplingConfig(solver="flow-euler", num_steps=10)
    sampler = Sampler(Networks(net), config, GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.0, 7 / 3)))
    assert [bool(step.predictor) for step in sampler.steps] == [1 - step.t <= 0.7 + 1e-9 for step in sampler.steps]


def test_flow_autoguidance_mixes_velocities_of_one_path() -> None:
    config, weight = SamplingConfig(solver="flow-euler", num_steps=3), GuidanceConfig(autoguidance=2.0)
    sampler = Sampler(Networks(net_of(), reference=net_of()), config, weight)
    assert isinstance(sampler.steps[0].predictor[0], Autoguidance)
    z = unit(3)
    torch.testing.assert_close(sampler.integrate(z), Sampler(Networks(net_of()), config).integrate(z))
    with pytest.raises(UserError, match="on the same path"):
        Sampler(Networks(net_of(), reference=net_of("gvp")), config, weight)


# What is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sampling", "guidance", "said"),
    [
        ({"solver": "ddpm"}, {}, "ddpm draws in discrete time"),
        ({"solver": "ddim"}, {}, "use flow-euler, .*dpmpp-2m"),
        ({"respacing": "50"}, {}, "leave out respacing"),
        ({"rho": 3.0, "sigma_max": 9.0}, {}, "leave out sigma_max, rho"),
        ({"clip_denoised": True}, {}, "leave out clip_denoised"),
        ({"num_steps": 0}, {}, "at least 1"),
        ({"solver": "flow-sde", "num_steps": 1}, {}, "at least 2"),
        ({"solver": "flow-sde", "diffusion": "sbdm"}, {}, "sbdm is infinite"),
        ({"solver": "flow-sde-heun", "last_step": "none"}, {}, "other than none"),
        ({"solver": "flow-sde", "reverse": True}, {}, "flow-euler and flow-heun do"),
        ({"diffusion": "linear"}, {}, "of flow-sde; flow-heun has none"),
        ({"diffusion": "linear", "solver": "heun"}, {}, "of flow-sde; heun has none"),
        ({"last_size": 1.0}, {}, "last_size between 0 and 1"),
        ({"diffusion": "sine"}, {}, "is not one of sigma"),
        ({}, {"dg_weight": 1.0, "dg_every": 2}, "dg_every above 1 do not go with flow-heun"),
        ({}, {"dg_weight": 1.0, "boosting": True}, "boosting"),
    ],
)  # fmt: skip
def test_flow_refuses_in_a_sentence(sampling: dict[str, Any], guidance: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings = SamplingConfig(**{"solver": "flow-heun", **sampling})
        Sampler(Networks(net_of(), discriminator=Slope()), settings, GuidanceConfig(**guidance))


def test_flow_solvers_want_a_network_of_flow_matching(tiny_net: Any) -> None:
    with pytest.raises(UserError, match="flow-heun is for networks of flow matching such as SiT; use heun"):
        Sampler(Networks(tiny_net()), SamplingConfig(solver="flow-heun"))


@pytest.mark.parametrize("wrong", [{"path": "cosine"}, {"prediction": "clean"}])
def test_flow_network_names_what_it_does_not_know(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not one of (linear|velocity)"):
        FlowPrecond(Gaussian(PATHS["linear"], "velocity"), 1, 1, 0, **wrong)
