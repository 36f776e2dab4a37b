"""Laws of the guidances, where the right answer is known in closed form, and DG's boosting written down twice."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import (
    OUTSIDE_WINDOW,
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    guided_denoiser,
)
from dgfast.networks import Networks
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]


def correction_of(guidance: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the guidance adds to the denoised images, and its log-ratio."""
    direction, gate, log_ratio = guidance.correct(*arguments)
    return gate.view(-1, 1, 1, 1) * direction, log_ratio


NO_WINDOW = (0.0, 2.0)  # every noise level in use


@dataclass
class Gaussian:
    """The perfect denoiser of independent pixels with this mean and variance; labels shift the mean, if it has any."""

    mean: float = 0.0
    variance: float = 0.25
    label_dim: int = 0
    img_channels: int = 1
    img_resolution: int = 1
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        mean: Tensor | float = self.mean
        if class_labels is not None:
            mean = mean + class_labels.argmax(dim=1).view(-1, 1, 1, 1)
        noise = sigma.view(-1, 1, 1, 1) ** 2
        return (self.variance * x + noise * mean) / (self.variance + noise)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def log_density(self, u: Tensor, sigma: Tensor) -> Tensor:
        """log p(u) of noisy images at the unit scale of the VP process, pixels summed: [B]."""
        alpha = nl.vp_alpha(sigma).view(-1, 1, 1, 1)
        variance = alpha**2 * (self.variance + sigma.view(-1, 1, 1, 1) ** 2)
        return -0.5 * ((u.double() - alpha * self.mean) ** 2 / variance + variance.log()).sum(dim=(1, 2, 3))


DATA, MODEL = Gaussian(mean=0.3, variance=0.25), Gaussian(mean=0.0, variance=0.36)


def exact_discriminator(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The log-ratio of DATA to MODEL: what a perfect discriminator of the two would answer."""
    sigma = nl.vp_sigma(t)
    return DATA.log_density(u, sigma) - MODEL.log_density(u, sigma)


def unwanted(*arguments: Any) -> Tensor:
    raise AssertionError("a network that guides nothing was called")


def batch(seed: int, size: int = 6, pixels: int = 2) -> tuple[Tensor, Tensor]:
    """x [B, 1, pixels, pixels] and sigma [B], one noise level a sample, drawn as data would be."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-2, 1.9, size, dtype=torch.float64)
    noise = torch.randn(size, 1, pixels, pixels, dtype=torch.float64, generator=generator)
    return 0.2 + (0.3 + sigma.view(-1, 1, 1, 1) ** 2).sqrt() * noise, sigma


def relative_error(mine: Tensor, reference: Tensor) -> float:
    return ((mine - reference).abs().max() / reference.abs().max()).item()


# Discriminator guidance -----------------------------------------------------------------------------------------------
def test_guidance_perfect_discriminator_turns_the_models_denoiser_into_the_datas() -> None:
    x, sigma = batch(seed=0)
    guidance = DiscriminatorGuidance(exact_discriminator, weight=1.0, window=NO_WINDOW)
    denoised, log_ratio = guided_denoiser(MODEL, [guidance])(x, sigma, None)
    for mine, plain, wanted in zip(denoised, MODEL(x, sigma, None), DATA(x, sigma, None), strict=True):
        assert (mine - wanted).abs().max() < 1e-4 * (plain - wanted).abs().max()  # the network reads float32
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
    for mine, wanted in zip(correction, reference, strict=True):
        assert relative_error(mine, wanted) < 1e-4
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
    wanted = [tau for tau in raised + nl.vp_time(levels)[1:].tolist() if window[0] <= tau <= window[1]]
    if S_churn == 0:
        assert sorted(seen) == pytest.approx(sorted(wanted))
    else:  # a step that churns across the window's edge may be judged by the network and then left alone
        assert set(round(tau, 9) for tau in wanted) <= set(round(tau, 9) for tau in seen)
        assert len(seen) <= len(wanted) + 2
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


# Boosting -------------------------------------------------------------------------------------------------------------
def boosted_sampler(
    net: nn.Module,
    discriminator: nn.Module,
    latents: Tensor,
    labels: Tensor,
    noises: list[Tensor],
    num_steps: int,
    weight: float,
    window: tuple[float, float],
) -> tuple[Tensor, list[Tensor]]:
    """DG's boosted sampler in plain words: boolean masks and one loop, after generate.py of the paper's code."""
    t_steps = [*nl.sigma_grid(SamplingConfig(num_steps=num_steps), 0.002, 80.0).tolist(), 0.0]
    x = latents.double() * t_steps[0]
    log_ratio = torch.full((len(x),), math.inf, dtype=torch.float64)
    ratios = []
    for i, (t, t_next) in enumerate(itertools.pairwise(t_steps)):
        t_hat = torch.full((len(x),), t, dtype=torch.float64)
        if i % 5 == 0:
            t_hat[log_ratio < 0] *= 1 + min(4 / num_steps, math.sqrt(2) - 1)
        x_hat = x + (t_hat**2 - t**2).sqrt().view(-1, 1, 1, 1) * noises[i]
        d = (x_hat - net(x_hat, t_hat, labels)) / t_hat.view(-1, 1, 1, 1)
        guide = torch.zeros_like(x)
        log_ratio = torch.full((len(x),), OUTSIDE_WINDOW, dtype=torch.float64)
        for k in range(len(x)):
            tau = nl.vp_time(t_hat[k])
            if not window[0] <= tau <= window[1]:
                continue
            alpha = (1 + t_hat[k] ** 2) ** -0.5
            u = (alpha * x_hat[k : k + 1]).float().requires_grad_()
            with torch.enable_grad():
                logit = discriminator(u, tau[None], labels[k : k + 1]).squeeze()
                log_ratio[k] = logit.detach()
                guide[k] = t_hat[k] ** 2 * alpha * torch.autograd.grad(logit, u)[0][0]
        if i % 2 == 0:
            guide[log_ratio < 0] *= 2
        d = d - weight * guide / t_hat.view(-1, 1, 1, 1)
        ratios.append(log_ratio)
        x_next = x_hat + (t_next - t_hat).view(-1, 1, 1, 1) * d
        if i < num_steps - 1:
            d_prime = (x_next - net(x_next, torch.full((len(x),), t_next), labels)) / t_next
            x_next = x_hat + (t_next - t_hat).view(-1, 1, 1, 1) * (d + d_prime) / 2
        x = x_next
    return x, ratios


@torch.no_grad()
def test_guidance_boosting_equals_the_published_loop(tiny_net: NetFactory, tiny_discriminator: NetFactory) -> None:
    steps, weight, window = 12, 1.5, (0.05, 0.95)
    net, discriminator, bias = tiny_net(label_dim=4), tiny_discriminator(num_classes=4), 0.0
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(6, 1, 8, 8, generator=generator)
    noises = [torch.randn(latents.shape, dtype=torch.float64, generator=generator) for _ in range(steps)]
    labels = F.one_hot(torch.tensor([0, 1, 2, 3, 0, 1]), 4).float()

    def balanced(u: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return discriminator(u, t, y) - bias  # so that both signs occur; a random net leans to one

    _, ratios = boosted_sampler(net, balanced, latents, labels, noises, steps, weight, window)
    bias = torch.stack([ratio for ratio in ratios if ratio.max() < 100]).median().item()
    reference, ratios = boosted_sampler(net, balanced, latents, labels, noises, steps, weight, window)
    churned = torch.stack([ratios[i - 1] < 0 for i in range(5, steps, 5)])
    assert churned.any() and not churned.all()  # some samples are churned anew, others are not

    config = GuidanceConfig(dg_weight=weight, dg_window=window, boosting=True)
    sampler = Sampler(Networks(net, discriminator=balanced), SamplingConfig(num_steps=steps), config)
    images = sampler.integrate(latents, labels, iter(noises).__next__)
    assert relative_error(images, reference) < 1e-4
    plain = Sampler(Networks(net, discriminator=balanced), sampler.sampling, GuidanceConfig(weight, dg_window=window))
    assert relative_error(plain.integrate(latents, labels), reference) > 1e-2


# Classifier guidance --------------------------------------------------------------------------------------------------
CLASSES = Gaussian(mean=-0.5, variance=0.1), Gaussian(mean=0.7, variance=0.1)


def exact_classifier(u: Tensor, t: Tensor) -> Tensor:
    """Logits of the two classes, which are equally frequent: Bayes' rule."""
    sigma = nl.vp_sigma(t)
    return torch.stack([source.log_density(u, sigma) for source in CLASSES], dim=1)


def mixture(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    """The denoiser of both classes together."""
    u = nl.vp_alpha(sigma).view(-1, 1, 1, 1) * x
    posterior = exact_classifier(u, nl.vp_time(sigma)).softmax(dim=1)
    parts = torch.stack([source(x, sigma, None) for source in CLASSES], dim=1)
    return (posterior[:, :, None, None, None] * parts).sum(dim=1)


@pytest.mark.parametrize("wanted", [0, 1])
def test_guidance_exact_classifier_turns_the_mixtures_denoiser_into_the_classs(wanted: int) -> None:
    x, sigma = batch(seed=4)
    labels = F.one_hot(torch.full((len(x),), wanted), 2).float()
    denoised, log_ratio = guided_denoiser(mixture, [ClassifierGuidance(exact_classifier, 1.0)])(x, sigma, labels)
    exact = CLASSES[wanted](x, sigma, None)
    assert (denoised - exact).abs().max() < 1e-4
    assert (mixture(x, sigma, None) - exact).abs().max() > 0.1
    assert (log_ratio == OUTSIDE_WINDOW).all()  # a classifier judges no sample real or generated


def test_guidance_classifier_equals_adms_correction_of_epsilon(tiny_net: NetFactory) -> None:
    """ADM: eps' = eps - sqrt(1 - alpha_bar) scale grad_xt log p(y | xt), and the image that eps' implies."""
    scale, net = 3.0, tiny_net()
    x, sigma = batch(seed=5, pixels=8)
    labels = F.one_hot(torch.arange(len(x)) % 5, 5).float()
    weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(6)) / 8

    def classifier(u: Tensor, t: Tensor) -> Tensor:
        return (u.flatten(1).tanh() * (1 + t[:, None]).float()) @ weights.to(u.dtype).T

    guided, _ = guided_denoiser(net, [ClassifierGuidance(classifier, scale)])(x, sigma, labels)
    root_alpha_bar = ((1 + sigma**2) ** -0.5).view(-1, 1, 1, 1)
    root_rest = (1 - root_alpha_bar**2).sqrt()
    x_t = (root_alpha_bar * x).requires_grad_()
    eps = (x - net(x, sigma)) / sigma.view(-1, 1, 1, 1)
    log_probability = (F.log_softmax(classifier(x_t, nl.vp_time(sigma)), dim=1) * labels).sum()
    (gradient,) = torch.autograd.grad(log_probability, x_t)
    image = (x_t - root_rest * (eps - scale * root_rest * gradient)) / root_alpha_bar
    torch.testing.assert_close(guided, image.detach(), rtol=1e-4, atol=1e-4)
    assert (guided - net(x, sigma)).abs().max() > 0.1


def test_guidance_classifier_leaves_samples_without_a_class_alone() -> None:
    x, sigma = batch(seed=7)
    labels = F.one_hot(torch.ones(len(x), dtype=torch.int64), 2).float()
    labels[::2] = 0
    correction, _ = correction_of(ClassifierGuidance(exact_classifier, 2.0), x, sigma, labels, x)
    assert not correction[::2].any() and correction[1::2].flatten(1).any(dim=1).all()
    with pytest.raises(ValueError, match="class labels"):
        ClassifierGuidance(exact_classifier, 2.0).correct(x, sigma, None, x)


# Guidance by another denoiser -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.5])
def test_guidance_by_another_denoiser_is_a_straight_line_between_the_two(tiny_net: NetFactory, scale: float) -> None:
    net, worse = tiny_net(label_dim=3), tiny_net(label_dim=3, prefix="worse/")
    x, sigma = batch(seed=8, pixels=8)
    labels = F.one_hot(torch.arange(len(x)) % 3, 3).float()
    conditional, unconditional = net(x, sigma, labels).double(), net(x, sigma).double()
    free, _ = guided_denoiser(net, [ClassifierFreeGuidance(net, scale)])(x, sigma, labels)
    torch.testing.assert_close(free, unconditional + scale * (conditional - unconditional))
    auto, _ = guided_denoiser(net, [Autoguidance(worse, scale)])(x, sigma, labels)
    reference = worse(x, sigma, labels).double()
    torch.testing.assert_close(auto, reference + scale * (conditional - reference))


def test_guidance_interval_is_open_below_and_closed_above(tiny_net: NetFactory) -> None:
    net, (x, _) = tiny_net(label_dim=3), batch(seed=9, pixels=8)
    sigma = torch.tensor([0.1, 0.5, 0.51, 2.0, 2.01, 40.0], dtype=torch.float64)
    labels = F.one_hot(torch.arange(6) % 3, 3).float()
    correction, _ = correction_of(ClassifierFreeGuidance(net, 2.0, (0.5, 2.0)), x, sigma, labels, net(x, sigma, labels))
    assert correction.flatten(1).any(dim=1).tolist() == [False, False, True, True, False, False]


def test_guidance_outside_its_interval_never_runs_the_unconditional_net(tiny_net: NetFactory) -> None:
    net, seen = tiny_net(label_dim=3), []

    class Watched:
        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
            if class_labels is None:
                seen.append(sigma[0].item())
            return net(x, sigma, class_labels)

        def __getattr__(self, name: str) -> Any:
            return getattr(net, name)

    config = GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.2, 10.0))
    sampler = Sampler(Networks(Watched()), SamplingConfig(num_steps=8), config)
    sampler(seeds=[0, 1])
    levels = [step.sigma for step in sampler.steps]
    assert sorted(seen) == pytest.approx(sorted(s for s in levels + levels[1:] if 0.2 < s <= 10.0))
    assert len(seen) == sampler.score_evaluations - 15 > 0


# All of them ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m"])
def test_guidance_of_weight_nothing_is_the_plain_sampler_bit_for_bit(tiny_net: NetFactory, solver: str) -> None:
    """And it runs none of the networks that would guide."""
    net, config = tiny_net(label_dim=3), SamplingConfig(num_steps=6, solver=solver)
    plain = Sampler(Networks(net), config)
    idle = Sampler(
        Networks(net, discriminator=unwanted, classifier=unwanted, reference=unwanted),
        config,
        GuidanceConfig(dg_weight=0.0, dg_weight_2nd=0.0, classifier_scale=0.0, cfg_scale=1.0, autoguidance=1.0),
    )
    assert torch.equal(idle(seeds=[4, 5], labels=[2, 0]), plain(seeds=[4, 5], labels=[2, 0]))
    assert idle.guidance_gradients == 0 and idle.score_evaluations == plain.score_evaluations


def test_guidances_add_up_in_any_order(tiny_net: NetFactory, tiny_discriminator: NetFactory) -> None:
    net, worse = tiny_net(label_dim=2), tiny_net(label_dim=2, prefix="worse/")
    guidances: list[Guidance] = [
        DiscriminatorGuidance(tiny_discriminator(), 1.5, NO_WINDOW),
        ClassifierGuidance(exact_classifier, 0.7),
        ClassifierFreeGuidance(net, 2.0),
        Autoguidance(worse, 1.4),
    ]
    x, sigma = batch(seed=10, pixels=8)
    labels = F.one_hot(torch.arange(len(x)) % 2, 2).float()
    plain, unjudged = guided_denoiser(net, [])(x, sigma, labels)
    assert plain.dtype == x.dtype and torch.equal(plain, net(x, sigma, labels).double())
    assert (unjudged == OUTSIDE_WINDOW).all()
    together, log_ratio = guided_denoiser(net, guidances)(x, sigma, labels)
    alone = [guided_denoiser(net, [guidance])(x, sigma, labels)[0] - plain for guidance in guidances]
    assert all(correction.abs().max() > 1e-3 for correction in alone)
    torch.testing.assert_close(together, plain + sum(alone))
    backwards, log_ratio_backwards = guided_denoiser(net, guidances[::-1])(x, sigma, labels)
    torch.testing.assert_close(together, backwards)
    assert torch.equal(log_ratio, log_ratio_backwards) and (log_ratio != OUTSIDE_WINDOW).all()
