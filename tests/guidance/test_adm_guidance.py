"""Guidance of ADM in the ancestral form, eager and compiled."""

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.guidance import (
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    WeightSchedule,
    guided_denoiser,
    guided_posterior,
)
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.runtimes import RUNTIMES
from dgfast.sampler import Sampler
from dgfast.solvers import ancestral_step
from tests.support.adm import TINY, NetFactory, bounds_of, exact, images, one_hot, steps_of


@pytest.fixture(scope="module")
def adm(filled_net: NetFactory) -> DDPMPrecond:
    """A conditional ADM for 8 x 8 images."""
    return DDPMPrecond(filled_net("create_model", TINY, "tiny/adm/"), 8, 3, 1000).eval()


@pytest.fixture(scope="module")
def classifier(filled_net: NetFactory) -> NoisyClassifier:
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 1000, "num_res_blocks": 1}
    keywords = shape | {"attention_resolutions": [], "channel_mult": [1, 2], "num_head_channels": 32}
    return NoisyClassifier(filled_net("EncoderUNetModel", keywords | {"pool": "attention"}, "tiny/adm_c/"))


# Guidance in the ancestral form ---------------------------------------------------------------------------------------
SLOPE = images(1, 1, 2, 2, seed=3)


def ramp(u: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """A log-ratio whose gradient is SLOPE, within the clamp for the u that are used here."""
    return (SLOPE.to(u.dtype) * u).sum(dim=(1, 2, 3))


def test_cosine_time_keeps_its_digits_in_float32() -> None:
    """Against the paper's arccos in double precision; in single it is off by 1e-3 timesteps where alpha is near 1."""
    sigma = torch.logspace(-2, 2, 50, dtype=torch.float64)
    at_zero = math.cos(0.008 / 1.008 * math.pi / 2)
    exact = 1.008 * (2 / math.pi) * (at_zero / (1 + sigma**2).sqrt()).arccos() - 0.008
    assert torch.allclose(nl.cosine_time(sigma), exact, rtol=0, atol=1e-13)
    assert float((nl.cosine_time(sigma.float()) - exact).abs().max()) < 2e-4 / 999


@pytest.mark.parametrize("v", [None, -1.0, 0.2, 1.0])
def test_adm_gradient_guidance_shifts_the_mean_by_variance_times_gradient(v: float | None) -> None:
    net, guidance = exact(v=v), DiscriminatorGuidance(ramp, 1.7)
    sigma = net.levels[[400, 800]]
    x = sigma.view(-1, 1, 1, 1) * images(2, 1, 2, 2)
    function = guided_posterior(net, [guidance])
    denoised, shift, variance, log_ratio = function(x, sigma, None, *bounds_of(-6.0, -3.0, 2))
    share = 0.0 if v is None else (v + 1) / 2
    reference = torch.full_like(x, math.exp(-6 + 3 * share))
    torch.testing.assert_close(variance, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift, 1.7 * reference * SLOPE, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(denoised, net(x, sigma).double())  # the gradient is in the shift alone
    torch.testing.assert_close(log_ratio, ramp(nl.vp_alpha(sigma).view(-1, 1, 1, 1) * x, sigma), rtol=1e-5, atol=1e-5)


def test_adm_mean_shift_with_the_posteriors_variance_is_a_correction_at_the_next_level() -> None:
    """algorithms.md, section 0: D' = D + w alpha_next sigma_next^2 grad_u l, then the step without shift."""
    net, x, noise = exact(), images(1, 1, 2, 2), images(1, 1, 2, 2, seed=5)
    for sigma, sigma_next, (least, _) in list(steps_of())[:-1]:
        arguments = (sigma * x, sigma.view(1), None, least.view(1), least.view(1))
        function = guided_posterior(net, [DiscriminatorGuidance(ramp, 0.7, window=(0.0, 2.0))])
        denoised, shift, variance, _ = function(*arguments)
        shifted = ancestral_step(sigma * x, denoised, shift, variance, sigma, sigma_next, noise)
        corrected = denoised + 0.7 * nl.vp_alpha(sigma_next) * sigma_next**2 * SLOPE
        same = ancestral_step(sigma * x, corrected, 0 * shift, variance, sigma, sigma_next, noise)
        assert (corrected - denoised).abs().max() > 1e-5
        torch.testing.assert_close(shifted, same, rtol=1e-6, atol=1e-7)


def test_adm_mixing_guidance_corrects_the_denoised_and_is_clipped_before_gradients() -> None:
    class Twice(Guidance):
        evaluations, gradients = 1, 0

        def active(self, sigma_low: float, sigma_high: float) -> bool:
            return True

        def correct(self, x: Tensor, sigma: Tensor, class_labels: Any, denoised: Tensor) -> Any:
            return denoised, torch.ones_like(sigma), None

    net = exact(mean=0.9, variance=1e-8)  # denoises to 0.9 everywhere
    sigma, x = net.levels[[700]], images(1, 1, 2, 2)
    gradient = DiscriminatorGuidance(ramp, 1.0)
    for clip, mixed in ((False, 1.8), (True, 1.0)):
        denoised, _ = guided_denoiser(net, [gradient, Twice()], clip)(x, sigma, None)
        added = (sigma**2 * nl.vp_alpha(sigma)).view(-1, 1, 1, 1) * SLOPE
        torch.testing.assert_close(denoised, mixed + added, rtol=1e-5, atol=1e-5)
        posterior, shift, variance, _ = guided_posterior(net, [gradient, Twice()], clip)(
            x, sigma, None, *bounds_of(-4.0, -4.0, 1)
        )
        torch.testing.assert_close(posterior, torch.full_like(x, mixed), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shift, variance * SLOPE, rtol=1e-5, atol=1e-9)


def test_adm_weight_0_is_bit_equal_to_unguided_and_calls_nothing(adm: DDPMPrecond) -> None:
    def unwanted(*arguments: Any) -> Tensor:
        raise AssertionError("a network that guides nothing was called")

    config = SamplingConfig(solver="ddpm", respacing="3", clip_denoised=True)
    plain = Sampler(Networks(adm), config)
    idle = Sampler(
        Networks(adm, classifier=unwanted, discriminator=unwanted),
        config,
        GuidanceConfig(classifier_scale=1.0, classifier_schedule=((0.5, 0.0),), dg_weight=0.0),
    )
    assert torch.equal(plain([1, 2]), idle([1, 2]))
    assert idle.guidance_gradients == 0 and idle.score_evaluations == 3


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-3, 3)), min_size=1, max_size=5))
def test_adm_weight_schedule_is_linear_between_its_points(points: list[tuple[float, float]]) -> None:
    points.sort(key=lambda point: point[0])
    tau = torch.linspace(0.001, 1, 57, dtype=torch.float64)
    factor = WeightSchedule(tuple(points))(nl.vp_sigma(tau)).numpy()
    taus, factors = zip(*points, strict=True)
    away = np.abs(tau.numpy()[:, None] - taus).min(axis=1) > 1e-6  # at a jump either side will do
    np.testing.assert_allclose(factor[away], np.interp(tau.numpy(), taus, factors)[away], atol=1e-5)


def test_adm_weight_schedule_leaves_out_the_calls_that_it_makes_0(
    adm: DDPMPrecond, classifier: NoisyClassifier
) -> None:
    config = SamplingConfig(solver="ddpm", respacing="10")
    guidance = GuidanceConfig(classifier_scale=2.0, classifier_schedule=((0.5, 0.0), (0.5, 1.0)))
    sampler = Sampler(Networks(adm, classifier=classifier, time=adm.time), config, guidance)
    assert [bool(step.predictor) for step in sampler.steps] == [True] * 5 + [False] * 5
    sigma = adm.levels[[900, 100]]
    (scheduled,) = sampler.steps[0].predictor
    _, gate, _ = scheduled.correct(images(2, 3, 8, 8), sigma, one_hot(1, 2), images(2, 3, 8, 8))
    assert gate[1] == 0 and gate[0] == pytest.approx(float(2 * sigma[0] ** 2 * nl.vp_alpha(sigma[0])))


def test_adm_classifier_guides_an_unconditional_network_by_its_own_classes(
    filled_net: NetFactory, classifier: NoisyClassifier
) -> None:
    raw = filled_net("create_model", TINY | {"class_cond": False}, "tiny/adm/")
    net = DDPMPrecond(raw, 8, 3, 0).eval()
    sampler = Sampler(
        Networks(net, classifier=classifier, time=net.time),
        SamplingConfig(solver="ddpm", respacing="4"),
        GuidanceConfig(classifier_scale=300.0),
    )
    one, other = sampler([5, 6], [3, 3]), sampler([5, 6], [3, 4])
    assert torch.allclose(one[0], other[0], atol=1e-4) and (one[1] - other[1]).abs().max() > 0.01
    with pytest.raises(UserError, match="classes 0 to 999"):
        sampler([5], [1000])


@pytest.mark.parametrize(
    ("sampling", "guidance", "message"),
    [
        ({}, {"cfg_scale": 2.0}, "trained without labels too"),
        ({}, {"dg_weight": 1.0, "dg_every": 2}, "nor dg_every above 1"),
        ({"respacing": "ddim999"}, {}, "no whole stride"),
        ({"respacing": None, "num_steps": 900}, {}, "round to one noise level"),
    ],
)
def test_adm_refuses_what_does_not_go_together(
    adm: DDPMPrecond, sampling: dict[str, Any], guidance: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(
            Networks(adm), SamplingConfig(**{"solver": "ddpm", "respacing": "5"} | sampling), GuidanceConfig(**guidance)
        )


def test_adm_respacing_is_for_networks_of_discrete_time(tiny_net: NetFactory) -> None:
    with pytest.raises(UserError, match="timesteps of their own"):
        Sampler(Networks(tiny_net()), SamplingConfig(respacing="5"))


def test_adm_is_sampled_by_the_other_solvers_too(adm: DDPMPrecond) -> None:
    """Heun on the same levels, and on EDM's grid rounded to them."""
    for config in (
        SamplingConfig(respacing="5"),
        SamplingConfig(num_steps=5),
        SamplingConfig(num_steps=5, S_churn=2.0),
    ):
        sampler = Sampler(Networks(adm), config)
        sigmas = torch.tensor([step.sigma for step in sampler.steps], dtype=torch.float64)
        assert torch.equal(adm.round_sigma(sigmas), sigmas) and sampler.score_evaluations == 9
        assert sampler([0]).isfinite().all()


# Runtimes -------------------------------------------------------------------------------------------------------------
def check_ancestral_function(built: Any, function: Any, net: DDPMPrecond) -> None:
    """The two agree at noise levels other than the example's, where guidance makes a difference."""
    for first, second in ((999, 250), (30, 0)):
        sigma = net.levels[[first, second]]
        x = (1 + sigma**2).sqrt().view(-1, 1, 1, 1) * images(2, 3, 8, 8, seed=first)
        inputs = x, sigma, one_hot(7, 500), *bounds_of(-5.0, -3.0, 2)
        with torch.no_grad():
            pairs = list(zip(built(*inputs), function(*inputs), strict=True))
        assert pairs[1][1].abs().max() > 1e-3, "no guidance to compare"
        for mine, reference in pairs:
            assert (mine - reference).abs().max() <= 2e-5 * reference.abs().max()


def test_adm_traced_and_lowered_ancestral_function_equals_eager(adm: DDPMPrecond, classifier: NoisyClassifier) -> None:
    function = guided_posterior(adm, [ClassifierGuidance(classifier, 100.0, adm.time)], clip=True)
    example = images(2, 3, 8, 8), adm.levels[[5, 6]], one_hot(1, 2), *bounds_of(-4.0, -2.0, 2)
    check_ancestral_function(lower(trace(function, example), example, channels_last=True), function, adm)


def test_adm_compiled_sampling_equals_eager(filled_net: NetFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = TINY | {"channel_mult": "1", "attention_resolutions": "1"}
    net = DDPMPrecond(filled_net("create_model", flat, "a/"), 8, 3, 1000)
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 1000, "num_res_blocks": 1}
    keywords = shape | {"attention_resolutions": [], "channel_mult": [1], "num_head_channels": 32}
    keywords |= {"use_scale_shift_norm": True, "resblock_updown": True}
    networks = Networks(net, classifier=NoisyClassifier(filled_net("EncoderUNetModel", keywords, "b/")), time=net.time)
    config = SamplingConfig(solver="ddpm", respacing="4", clip_denoised=True)
    guidance = GuidanceConfig(classifier_scale=100.0)
    built: list[Function] = []

    def build(function: Function, example: Sequence[Tensor | None]) -> Function:
        built.append(RUNTIMES["compiled"].build(function, example))
        return built[-1]

    eager, fast = (Sampler(networks, config, guidance, runtime=runtime) for runtime in ("eager", build))
    fast.prepare(2)
    (compiled,) = built
    assert networks.classifier is not None
    function = guided_posterior(net, [ClassifierGuidance(networks.classifier, 100.0, net.time)], clip=True)
    check_ancestral_function(compiled, function, net)
    assert (fast([1, 2]) - eager([1, 2])).abs().max() < 1e-4
