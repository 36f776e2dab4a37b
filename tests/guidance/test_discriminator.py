"""Laws of discriminator guidance, where the right answer is known in closed form."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.graph.agreement import relative_error
from dgfast.guidance import (
    OUTSIDE_WINDOW,
    DiscriminatorGuidance,
    guided_denoiser,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.guidance import (
    DATA,
    MODEL,
    NO_WINDOW,
    batch,
    correction_of,
    exact_discriminator,
)

NetFactory = Callable[..., Any]


def test_guidance_perfect_discriminator_turns_the_models_denoiser_into_the_datas() -> None:
    x, sigma = batch(seed=0)
    guidance = DiscriminatorGuidance(exact_discriminator, weight=1.0, window=NO_WINDOW)
    denoised, log_ratio = guided_denoiser(MODEL, [guidance])(x, sigma, None)
    for mine, plain, exact in zip(denoised, MODEL(x, sigma, None), DATA(x, sigma, None), strict=True):
        assert (mine - exact).abs().max() < 1e-4 * (plain - exact).abs().max()  # the network reads float32
    torch.testing.assert_close(
        log_ratio,
        exact_discriminator(nl.vp_alpha(sigma).view(-1, 1, 1, 1) * x, nl.vp_time(sigma), None),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m"])
def test_guidance_perfect_discriminator_makes_samples_of_the_data(solver: str) -> None:
    """Path by path the flow of the data, so its mean and variance too; without guidance those of the model."""
    count, config = 4000, SamplingConfig(num_steps=48, solver=solver)
    start = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    guided = Sampler(
        Networks(MODEL, discriminator=exact_discriminator),
        config,
        GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0, dg_window=NO_WINDOW),
    ).integrate(start)
    plain = Sampler(Networks(MODEL), config).integrate(start)
    for images, source in ((guided, DATA), (plain, MODEL)):
        spread = (source.variance / (source.variance + 80.0**2)) ** 0.5
        exact = source.mean + spread * (80.0 * start - source.mean)
        assert (images - exact).abs().max() < 0.02
        assert images.mean().item() == pytest.approx(source.mean, abs=5 * (source.variance / count) ** 0.5 + 5e-3)
        assert images.var().item() == pytest.approx(source.variance, rel=5 * (2 / count) ** 0.5 + 1e-2)


def test_guidance_is_the_gradient_of_the_log_ratio_with_respect_to_x(tiny_discriminator: NetFactory) -> None:
    """sigma^2 d/dx logit(alpha x), everything in float64; the guidance itself runs the network in float32."""
    discriminator = tiny_discriminator()
    x, sigma = batch(seed=2, pixels=8)
    correction, log_ratio = correction_of(DiscriminatorGuidance(discriminator, window=NO_WINDOW), x, sigma, None, x)
    x.requires_grad_()
    alpha, level = ((1 + sigma**2) ** -0.5).view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    logit = copy.deepcopy(discriminator).double()(alpha * x, nl.vp_time(sigma), None)
    assert logit.abs().max() < 11  # inside the gate
    reference = level**2 * torch.autograd.grad(logit.sum(), x)[0]
    for mine, exact in zip(correction, reference, strict=True):
        assert relative_error(mine, exact) < 1e-4
    assert relative_error(log_ratio, logit) < 1e-4


def test_guidance_leaves_the_weights_alone(tiny_discriminator: NetFactory) -> None:
    trainable = copy.deepcopy(tiny_discriminator()).requires_grad_(True)
    x, sigma = batch(seed=3, pixels=8)
    correction, log_ratio = correction_of(DiscriminatorGuidance(trainable, window=NO_WINDOW), x, sigma, None, x)
    assert correction.any() and not correction.requires_grad and not log_ratio.requires_grad
    assert all(parameter.grad is None for parameter in trainable.parameters())
    assert not x.requires_grad


def test_guidance_gate_stops_the_gradient_where_the_discriminator_is_certain() -> None:
    """DG clips d to [1e-5, 1 - 1e-5]; the logit stops at 11.5129 there, and pulls no further."""
    limit = 11.5129
    logits = torch.tensor([-40.0, -limit - 1e-3, -limit + 1e-3, 0.0, limit - 1e-3, limit + 1e-3, 40.0])
    sigma = torch.full((7,), 0.75, dtype=torch.float64)
    u = logits.double().view(-1, 1, 1, 1)
    guidance = DiscriminatorGuidance(lambda u, t, y: u.flatten(), window=NO_WINDOW)
    correction, log_ratio = correction_of(guidance, u / nl.vp_alpha(sigma).view(-1, 1, 1, 1), sigma, None, u)
    pull = 0.75**2 * 0.8  # sigma^2 alpha times the slope 1 of this logit
    torch.testing.assert_close(correction.flatten(), torch.tensor([0, 0, pull, pull, pull, 0, 0]).double())
    assert not correction.flatten()[[0, 1, 5, 6]].any()  # exactly zero, not nearly
    torch.testing.assert_close(log_ratio, logits.clip(-11.512915, 11.512915))


def test_guidance_window_is_judged_for_each_sample() -> None:
    """Samples below and above the window get nothing and the log-ratio that stands for "not judged"."""
    tau = torch.tensor([0.1, 0.29, 0.31, 0.5, 0.69, 0.71, 0.9], dtype=torch.float64)
    x = torch.ones(7, 1, 2, 2, dtype=torch.float64)
    guidance = DiscriminatorGuidance(lambda u, t, y: -u.sum(dim=(1, 2, 3)), window=(0.3, 0.7))
    correction, log_ratio = correction_of(guidance, x, nl.vp_sigma(tau), None, x)
    inside = torch.tensor([False, False, True, True, True, False, False])
    assert correction.flatten(1).any(dim=1).tolist() == inside.tolist()
    assert (log_ratio == OUTSIDE_WINDOW).tolist() == (~inside).tolist()
    published = DiscriminatorGuidance(guidance.discriminator, window=(0.3, 0.7), published_window=True)
    assert not correction_of(published, x, nl.vp_sigma(tau), None, x)[0].any()  # one sample below switches all off
    assert correction_of(published, x[2:], nl.vp_sigma(tau[2:]), None, x)[0].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("S_churn", [0.0, 6.0])
def test_guidance_outside_its_window_never_runs_the_network(S_churn: float) -> None:
    seen: list[float] = []

    def discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        seen.append(t[0].item())
        return u.sum(dim=(1, 2, 3))

    window = 0.2, 0.6
    start = torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(
        Networks(MODEL, discriminator=discriminator),
        SamplingConfig(num_steps=16, S_churn=S_churn),
        GuidanceConfig(dg_weight=0.1, dg_weight_2nd=0.1, dg_window=window),
    )
    sampler.integrate(start, noise=lambda: torch.zeros_like(start))
    levels = torch.tensor([step.sigma for step in sampler.steps], dtype=torch.float64)
    raised = [nl.vp_time(sigma * (1 + step.gamma)).item() for sigma, step in zip(levels, sampler.steps, strict=True)]
    inside = [tau for tau in raised + nl.vp_time(levels)[1:].tolist() if window[0] <= tau <= window[1]]
    if S_churn == 0:
        assert sorted(seen) == pytest.approx(sorted(inside))
    else:  # a step that churns across the window's edge may be judged by the network and then left alone
        assert set(round(tau, 9) for tau in inside) <= set(round(tau, 9) for tau in seen)
        assert len(seen) <= len(inside) + 2
    assert 0 < len(seen) == sampler.guidance_gradients < 31


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(("S_churn", "boosting"), [(0.0, False), (5.0, False), (0.0, True)])
def test_guidance_that_is_left_out_would_have_changed_nothing(
    monkeypatch: pytest.MonkeyPatch, alpha: float, S_churn: float, boosting: bool
) -> None:
    """The plan leaves networks out before it knows any image; churn moves the levels, alpha the second points."""
    config = SamplingConfig(num_steps=12, alpha=alpha, S_churn=S_churn)
    generator = torch.Generator().manual_seed(12)
    start = torch.randn(8, 1, 1, 1, generator=generator)
    noises = torch.randn(12, 8, 1, 1, 1, dtype=torch.float64, generator=generator)
    networks = Networks(MODEL, discriminator=lambda u, t, y: u.flatten() - 0.1)
    step = Sampler(networks, config).steps[5]  # also boosting's second step that churns
    # Edges of the window that only a churned level or second point, or only one without churn, lies inside.
    for level in (step.sigma * 1.1, step.t + alpha * (step.t_next - step.t) + 0.05 * step.t, step.sigma):
        edge = nl.vp_time(torch.tensor(level, dtype=torch.float64)).item()
        for window in ((edge, 2.0), (0.0, edge)):
            guidance = GuidanceConfig(dg_weight=0.5, dg_weight_2nd=0.5, dg_window=window, boosting=boosting)
            sampler = Sampler(networks, config, guidance)
            images = sampler.integrate(start, noise=iter(noises).__next__)
            with monkeypatch.context() as patch:
                patch.setattr(DiscriminatorGuidance, "active", lambda *_: True)
                asked_always = Sampler(networks, config, guidance)
            assert sampler.guidance_gradients < asked_always.guidance_gradients == 23
            assert torch.equal(images, asked_always.integrate(start, noise=iter(noises).__next__))
