"""Low-density guidance and guidance toward the predicted clean image, against closed forms and float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dgfast
from dgfast import bundle as bundles
from dgfast import nets
from dgfast import noise_levels as nl
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    ClassifierGuidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    guided_denoiser,
)
from dgfast.guidance.gradient import NORMALIZATIONS, normalized
from dgfast.guidance.predicted_clean import CLEAN_TIMES
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.guidance import (
    CLASSES,
    MEANS,
    VARIANCE,
    batch,
    column,
    correction_of,
    exact_classifier,
    mixture,
    probability,
    reference_norm,
    rows,
    unwanted,
)

NetFactory = Callable[..., Any]


# The noisy image ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [0, 1])
def test_low_density_of_diversity_1_turns_the_classs_denoiser_into_the_mixtures(label: int) -> None:
    """p(x | y) p(y | x)^-1 is p(x), but for a constant."""
    x, sigma = batch(seed=0)
    guidance = LowDensityGuidance(exact_classifier, 1.0)
    denoised, _ = guided_denoiser(CLASSES[label], [guidance])(x, sigma, rows(label, len(x)))
    exact = mixture(x, sigma, None)
    assert (denoised - exact).abs().max() < 1e-4
    assert (CLASSES[label](x, sigma, None) - exact).abs().max() > 0.1


def test_low_density_below_0_is_classifier_guidance() -> None:
    """The paper's algorithm 2; and at weight 1 it makes a class of the mixture."""
    x, sigma = batch(seed=1)
    for weight in (1.0, 2.5):
        guidance = LowDensityGuidance(exact_classifier, -weight), ClassifierGuidance(exact_classifier, weight)
        mine, theirs = (correction_of(g, x, sigma, rows(1, len(x)), x)[0] for g in guidance)
        assert torch.equal(mine, theirs) and mine.any()
    denoised, _ = guided_denoiser(mixture, [LowDensityGuidance(exact_classifier, -1.0, target=0)])(x, sigma, None)
    assert (denoised - CLASSES[0](x, sigma, None)).abs().max() < 1e-4


# The predicted clean image --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("read_at_t", [True, False])
def test_predicted_clean_is_the_gradient_at_the_denoised_image(label: int, read_at_t: bool) -> None:
    """In closed form and float64: x0hat in the place of u, at the noise level that the classifier is told."""
    x, sigma = batch(seed=2)
    x0hat, b = sum(MEANS) / 2 + 0.2 * x / x.abs().amax(dim=(1, 2, 3), keepdim=True), 1.7
    guidance = PredictedCleanGuidance(exact_classifier, b, read_at_t=read_at_t)
    direction, gate, _ = guidance.correct(x, sigma, rows(label, len(x)), x0hat)
    told = sigma if read_at_t else torch.zeros_like(sigma)
    alpha = nl.vp_alpha(told)
    pull = label - probability(x0hat, told, alpha)  # of log p(label | x0hat) in the classes' difference
    gradient = pull * (MEANS[1] - MEANS[0]) / (alpha * (VARIANCE + told**2))
    torch.testing.assert_close(direction.double(), column(gradient).expand_as(x), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(gate, b * sigma**2 / (1 + sigma**2) ** 0.5)
    assert gradient.abs().max() > 0.1


class OneWay(torch.autograd.Function):
    """An identity through which no gradient may pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise AssertionError("a gradient went through the score network")


def test_predicted_clean_gradient_never_goes_through_the_score_network() -> None:
    calls = []

    def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        calls.append("score")
        return OneWay.apply(CLASSES[0](x, sigma, None))  # type: ignore[no-untyped-call]

    def classifier(u: Tensor, t: Tensor) -> Tensor:
        calls.append("classifier")
        return exact_classifier(u, t)

    x, sigma = batch(seed=3)
    x.requires_grad_()  # so that there is a way back, for those who look for it
    with pytest.raises(AssertionError, match="through the score network"):
        denoiser(x, sigma, None).sum().backward()
    calls.clear()
    with torch.enable_grad():
        denoised, _ = guided_denoiser(denoiser, [PredictedCleanGuidance(classifier, 1.0)])(x, sigma, rows(1, len(x)))
    assert calls == ["score", "classifier"]
    assert (denoised - CLASSES[0](x, sigma, None)).abs().max() > 0.1


# What both share ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", NORMALIZATIONS)
@given(seed=st.integers(0, 1000), channels=st.integers(1, 3), exponent=st.integers(-6, 6))
def test_normalized_equals_its_formula_in_float64(how: str, seed: int, channels: int, exponent: int) -> None:
    gradient = 10.0**exponent * torch.randn(3, channels, 4, 5, generator=torch.Generator().manual_seed(seed))
    gradient[1] = 0  # a certain classifier
    gradient[2, :, 0] = 0
    mine = normalized(gradient, how)
    torch.testing.assert_close(mine.double(), reference_norm(gradient, how), rtol=1e-5, atol=0)
    assert not mine[1].any() and mine.isfinite().all()
    if how != "none":
        torch.testing.assert_close(normalized(7 * gradient, how), mine)


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_low_density_terms_add_up_and_are_normalized(how: str) -> None:
    x, sigma = batch(seed=4)
    labels, plain = rows(0, len(x)), CLASSES[0](x, sigma, None)
    a = LowDensityGuidance(exact_classifier, 0.5, how)
    b = PredictedCleanGuidance(exact_classifier, 2.0, how)
    denoised, _ = guided_denoiser(CLASSES[0], [a, b])(x, sigma, labels)
    gate = column(sigma**2 * nl.vp_alpha(sigma))
    g_u = a.correct(x, sigma, labels, plain)[0]
    g_x0 = b.correct(x, sigma, labels, plain)[0]
    torch.testing.assert_close(denoised, plain + gate * (-0.5 * g_u + 2.0 * g_x0))
    unnormalized = LowDensityGuidance(exact_classifier, 0.5).correct(x, sigma, labels, plain)[0]
    torch.testing.assert_close(g_u.double(), reference_norm(unnormalized, how), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [LowDensityGuidance, PredictedCleanGuidance])
def test_low_density_class_of_a_term_replaces_the_samples_own(kind: Any) -> None:
    """One class for all samples, with and without labels; without either there is nothing to guide by."""
    x, sigma = batch(seed=5)
    name = "target" if kind is LowDensityGuidance else "base"
    own, log_ratio = correction_of(kind(exact_classifier, 1.0), x, sigma, rows(1, len(x)), x)
    named = kind(exact_classifier, 1.0, **{name: 1})
    assert log_ratio is None  # a classifier judges no sample real or generated
    assert own.any() and torch.equal(correction_of(named, x, sigma, rows(0, len(x)), x)[0], own)
    assert torch.equal(correction_of(named, x, sigma, None, x)[0], own)
    assert not correction_of(kind(exact_classifier, 1.0), x, sigma, torch.zeros(len(x), 2), x)[0].any()
    with pytest.raises(ValueError, match="class labels"):
        kind(exact_classifier, 1.0).correct(x, sigma, None, x)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m", "ddpm", "ddim"])
def test_low_density_of_weight_0_is_the_plain_sampler_bit_for_bit(tiny_net: NetFactory, solver: str) -> None:
    net, config = tiny_net(label_dim=3), SamplingConfig(num_steps=5, solver=solver)
    idle = Sampler(Networks(net, classifier=unwanted), config, GuidanceConfig(diversity=0, fidelity=0))
    assert torch.equal(idle([4, 5], [2, 0]), Sampler(Networks(net), config)([4, 5], [2, 0]))
    assert idle.guidance_gradients == 0


def test_low_density_costs_a_gradient_a_term_at_every_call(tiny_net: NetFactory) -> None:
    networks, config = Networks(tiny_net(label_dim=2), classifier=exact_classifier), SamplingConfig(num_steps=5)
    for guidance, gradients in (({"diversity": 1.0}, 9), ({"fidelity": 1.0}, 9), ({"diversity": 1, "fidelity": 1}, 18)):
        sampler = Sampler(networks, config, GuidanceConfig(**guidance))
        assert (sampler.score_evaluations, sampler.guidance_gradients) == (9, gradients)


def test_low_density_config_reaches_the_guidances(tiny_net: NetFactory) -> None:
    networks = Networks(tiny_net(label_dim=2), classifier=exact_classifier)
    config = GuidanceConfig(
        diversity=0.5, fidelity=2.0, perceptual=True, normalize="max_abs", clean_time="0", target_class=1, base_class=0
    )
    a, b = Sampler(networks, SamplingConfig(num_steps=2), config).steps[0].predictor
    assert isinstance(a, LowDensityGuidance) and isinstance(b, PredictedCleanGuidance)
    assert (a.diversity, a.normalize, a.target) == (-0.5, "max_abs", 1)
    assert (b.fidelity, b.normalize, b.base, b.read_at_t) == (2.0, "max_abs", 0, False)
    plain = GuidanceConfig(diversity=0.5, fidelity=2.0)
    a, b = Sampler(networks, SamplingConfig(num_steps=2), plain).steps[0].predictor
    assert isinstance(a, LowDensityGuidance) and isinstance(b, PredictedCleanGuidance)
    assert (a.diversity, a.target, b.base, b.read_at_t) == (0.5, None, None, True)


# Bad input ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fidelity": -1}, "at least 0"),
        ({"diversity": math.nan}, "diversity nan is not a finite number"),
        ({"fidelity": 1, "clean_time": "1"}, "clean_time '1' is not one of t, 0"),
        ({"diversity": 1, "normalize": "l2"}, "normalize 'l2' is not one of none, sample_l2"),
        ({"diversity": 1, "classifier_scale": 1}, "set one of them to 0"),
    ],
    ids=str,
)
def test_low_density_config_refuses(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**weights)


def test_low_density_allows_a_classifier_scale_for_another_class() -> None:
    assert GuidanceConfig(diversity=1, target_class=3, classifier_scale=1).target_class == 3
    assert set(CLEAN_TIMES) == {"t", "0"}


@pytest.mark.parametrize("term", ["diversity", "fidelity"])
def test_low_density_without_a_fitting_classifier_says_what_is_missing(tiny_net: NetFactory, term: str) -> None:
    net, config, weights = tiny_net(label_dim=2), SamplingConfig(num_steps=2), dict[str, Any]({term: 1.0})
    for networks, message in (
        (Networks(net), "needs a classifier network"),
        (Networks(net, classifier=lambda u: u), "needs a noise-aware classifier"),  # type: ignore[arg-type, misc]
        (Networks(tiny_net(), classifier=exact_classifier), "conditional score network, a (target|base) class, or"),
    ):
        with pytest.raises(UserError, match=message):
            Sampler(networks, config, GuidanceConfig(**weights))


def test_low_density_guides_an_unconditional_net_toward_a_named_class(
    tiny_net: NetFactory, tiny_classifier: NoisyClassifier
) -> None:
    networks, config = Networks(tiny_net(), classifier=tiny_classifier), SamplingConfig(num_steps=3)
    guided = Sampler(networks, config, GuidanceConfig(fidelity=5.0, base_class=2))
    assert not torch.equal(guided([0]), Sampler(networks, config)([0]))
    with pytest.raises(UserError, match="base class 3 is out of range; the classifier knows classes 0 to 2"):
        Sampler(networks, config, GuidanceConfig(fidelity=5.0, base_class=3))


def test_networks_classifier_of_clean_images_is_refused(tmp_path: Path) -> None:
    score = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16}
    clean = {"in_channels": 1, "channels": 4, "num_classes": 3}
    bundle = Bundle(tmp_path, "clean", {})
    for role, kind, keywords in (
        ("score", "EDMPrecond", score | {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}),
        ("classifier", "FeatureNet", clean),
    ):
        bundle = bundles.with_net(bundle, role, nets.build(kind, **keywords), kind, keywords)
    with pytest.raises(UserError, match="its classifier, a FeatureNet, reads no noise level; guidance needs"):
        dgfast.load(bundle, guidance=GuidanceConfig(fidelity=1.0))
