"""Low-density guidance and guidance toward the predicted clean image, against closed forms and float64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dgfast
from dgfast import bundle as bundles
from dgfast import nets
from dgfast import noise_levels as nl
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.guidance import (
    ClassifierGuidance,
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    guided_denoiser,
    guided_posterior,
)
from dgfast.guidance.gradient import NORMALIZATIONS, normalized
from dgfast.guidance.predicted_clean import CLEAN_TIMES
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.runtimes.cpu import build as cpu
from dgfast.sampler import Sampler
from dgfast.solvers import ancestral_step

NetFactory = Callable[..., Any]

MEANS, VARIANCE = (-0.5, 0.7), 0.1  # of two equally frequent classes of independent Gaussian pixels


class Exact(nn.Module):
    """A closed form as the score network of a sampler."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 1, 2, 0.0, math.inf

    def __init__(self, denoiser: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.denoiser(x, sigma, None)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def class_denoiser(label: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The perfect denoiser of one class."""

    def denoise(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        noise = column(sigma) ** 2
        return (VARIANCE * x + noise * MEANS[label]) / (VARIANCE + noise)

    return denoise


def exact_classifier(u: Tensor, t: Tensor) -> Tensor:
    """Logits of the classes by Bayes' rule."""
    sigma = nl.vp_sigma(t)
    alpha = nl.vp_alpha(sigma)
    variance = alpha**2 * (VARIANCE + sigma**2)
    squares = [((u.double() - column(alpha) * mean) ** 2).sum(dim=(1, 2, 3)) for mean in MEANS]
    return torch.stack([-0.5 * square / variance for square in squares], dim=1)


def probability(u: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """p(class 1 | u) [B], written down anew: the logistic function of one straight line."""
    low, high = MEANS
    middle = (u - column(alpha) * (low + high) / 2).sum(dim=(1, 2, 3))
    return torch.sigmoid((high - low) * middle / (alpha * (VARIANCE + sigma**2)))


def mixture(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    """The perfect denoiser of both classes together."""
    alpha = nl.vp_alpha(sigma)
    high = column(probability(column(alpha) * x, sigma, alpha))
    return (1 - high) * class_denoiser(0)(x, sigma, None) + high * class_denoiser(1)(x, sigma, None)


def batch(seed: int, size: int = 6, pixels: int = 2) -> tuple[Tensor, Tensor]:
    """x [B, 1, pixels, pixels] and sigma [B], one noise level a sample, drawn as data would be."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-2, 1.9, size, dtype=torch.float64)
    noise = torch.randn(size, 1, pixels, pixels, dtype=torch.float64, generator=generator)
    return 0.1 + (0.3 + column(sigma) ** 2).sqrt() * noise, sigma


def rows(label: int, count: int, classes: int = 2) -> Tensor:
    return F.one_hot(torch.full((count,), label), classes).float()


def correction_of(guidance: Any, *arguments: Any) -> Tensor:
    direction, gate, log_ratio = guidance.correct(*arguments)
    assert log_ratio is None
    return column(gate) * direction


def unwanted(*arguments: Any) -> Tensor:
    raise AssertionError("a network that guides nothing was called")


# The noisy image ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [0, 1])
def test_low_density_of_diversity_1_turns_the_classs_denoiser_into_the_mixtures(label: int) -> None:
    """p(x | y) p(y | x)^-1 is p(x), but for a constant."""
    x, sigma = batch(seed=0)
    guidance = LowDensityGuidance(exact_classifier, 1.0)
    denoised, _ = guided_denoiser(class_denoiser(label), [guidance])(x, sigma, rows(label, len(x)))
    exact = mixture(x, sigma, None)
    assert (denoised - exact).abs().max() < 1e-4
    assert (class_denoiser(label)(x, sigma, None) - exact).abs().max() > 0.1


def test_low_density_below_0_is_classifier_guidance() -> None:
    """The paper's algorithm 2; and at weight 1 it makes a class of the mixture."""
    x, sigma = batch(seed=1)
    for weight in (1.0, 2.5):
        guidance = LowDensityGuidance(exact_classifier, -weight), ClassifierGuidance(exact_classifier, weight)
        mine, theirs = (correction_of(g, x, sigma, rows(1, len(x)), x) for g in guidance)
        assert torch.equal(mine, theirs) and mine.any()
    denoised, _ = guided_denoiser(mixture, [LowDensityGuidance(exact_classifier, -1.0, target=0)])(x, sigma, None)
    assert (denoised - class_denoiser(0)(x, sigma, None)).abs().max() < 1e-4


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
        return OneWay.apply(class_denoiser(0)(x, sigma, None))

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
    assert (denoised - class_denoiser(0)(x, sigma, None)).abs().max() > 0.1


# What both share ------------------------------------------------------------------------------------------------------
def reference_norm(gradient: Tensor, how: str) -> Tensor:
    g = gradient.double()
    length = {
        "none": torch.ones(1, dtype=torch.float64),
        "sample_l2": (g**2).sum(dim=(1, 2, 3), keepdim=True).sqrt(),
        "channel_l2": (g**2).sum(dim=1, keepdim=True).sqrt(),
        "max_abs": g.abs().amax(dim=(1, 2, 3), keepdim=True),
    }[how]
    return torch.where(length > 0, g / length, 0.0)


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
    labels, plain = rows(0, len(x)), class_denoiser(0)(x, sigma, None)
    a = LowDensityGuidance(exact_classifier, 0.5, how)
    b = PredictedCleanGuidance(exact_classifier, 2.0, how)
    denoised, _ = guided_denoiser(class_denoiser(0), [a, b])(x, sigma, labels)
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
    own = correction_of(kind(exact_classifier, 1.0), x, sigma, rows(1, len(x)), x)
    named = kind(exact_classifier, 1.0, **{name: 1})
    assert own.any() and torch.equal(correction_of(named, x, sigma, rows(0, len(x)), x), own)
    assert torch.equal(correction_of(named, x, sigma, None, x), own)
    assert not correction_of(kind(exact_classifier, 1.0), x, sigma, torch.zeros(len(x), 2), x).any()
    with pytest.raises(ValueError, match="class labels"):
        kind(exact_classifier, 1.0).correct(x, sigma, None, x)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m", "ddpm", "ddim"])
def test_low_density_of_weight_0_is_the_plain_sampler_bit_for_bit(tiny_net: NetFactory, solver: str) -> None:
    net, config = tiny_net(label_dim=3), SamplingConfig(num_steps=5, solver=solver)
    idle = Sampler(
        Networks(net, classifier=unwanted), config, GuidanceConfig(diversity=0, fidelity=0, normalize="max_abs")
    )
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


# The published ancestral form -----------------------------------------------------------------------------------------
def reference_gradient(image: Tensor, sigma: Tensor, labels: Tensor, how: str) -> Tensor:
    image = image.detach().requires_grad_()
    log_probability = (exact_classifier(image, nl.vp_time(sigma)).log_softmax(dim=1) * labels).sum()
    return reference_norm(torch.autograd.grad(log_probability, image)[0], how)


def algorithm_1(
    latents: Tensor, noises: list[Tensor], levels: list[float], label: int, a: float, b: float, how: str
) -> Tensor:
    """Algorithm 1 of arXiv 2606.13347 in its own coordinates, x_t of unit variance, on class 0's exact denoiser."""
    x_t, labels = latents, rows(label, len(latents))
    bars = [1 / (1 + level**2) for level in levels] + [1.0]
    for i, level in enumerate(levels):
        bar, bar_next = bars[i], bars[i + 1]
        sigma = torch.full((len(x_t),), level, dtype=torch.float64)
        x0hat = class_denoiser(0)(x_t / bar**0.5, sigma, None)
        beta = 1 - bar / bar_next
        mu = (bar_next**0.5 * beta * x0hat + (bar / bar_next) ** 0.5 * (1 - bar_next) * x_t) / (1 - bar)
        variance = beta * (1 - bar_next) / (1 - bar)
        mu = mu - a * variance * reference_gradient(x_t, sigma, labels, how)
        mu = mu + b * variance * reference_gradient(x0hat, sigma, labels, how)
        x_t = mu + variance**0.5 * noises[i]
    return x_t


@pytest.mark.parametrize("how", ["none", "sample_l2"])
@pytest.mark.parametrize(("a", "perceptual"), [(1.5, False), (0.7, True)])
def test_low_density_under_ddpm_is_the_papers_algorithm(how: str, a: float, perceptual: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=generator)
    noises = [torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=generator) for _ in range(12)]
    config = SamplingConfig(num_steps=12, solver="ddpm", sigma_min=0.5, sigma_max=50.0)
    guidance = GuidanceConfig(diversity=a, fidelity=2.0, perceptual=perceptual, normalize=how)
    sampler = Sampler(Networks(Exact(class_denoiser(0)), classifier=exact_classifier), config, guidance)
    images = sampler.integrate(latents, rows(1, 8), iter(noises).__next__)
    levels = [step.sigma for step in sampler.steps]
    reference = algorithm_1(latents, noises, levels, 1, -a if perceptual else a, 2.0, how)
    assert (images - reference).abs().max() < 1e-4
    unguided = algorithm_1(latents, noises, levels, 1, 0.0, 0.0, how)
    assert (images - unguided).abs().max() > 0.01


def test_low_density_shift_is_a_correction_of_the_denoised_image() -> None:
    """By the posterior variance: alpha' sigma'^2 at the next level in the place of sigma^2 alpha, the gate at this."""
    x, _ = batch(seed=10)
    sigma, sigma_next = (torch.full((len(x),), level, dtype=torch.float64) for level in (2.0, 1.2))
    labels = rows(1, len(x))
    guidances: list[Guidance] = [LowDensityGuidance(exact_classifier, 0.8), PredictedCleanGuidance(exact_classifier, 2)]
    log_variance = (nl.vp_alpha(sigma_next) ** 2 * sigma_next**2 * (1 - (sigma_next / sigma) ** 2)).log()
    posterior = guided_posterior(class_denoiser(0), guidances)(x, sigma, labels, log_variance, log_variance)
    step = ancestral_step(x, *posterior[:3], column(sigma), column(sigma_next), torch.zeros_like(x))
    here, there = (level**2 * nl.vp_alpha(level) for level in (sigma, sigma_next))
    plain, guided = (guided_denoiser(class_denoiser(0), some)(x, sigma, labels)[0] for some in ([], guidances))
    denoised = plain + column(there / here) * (guided - plain)
    torch.testing.assert_close(step, denoised + column(sigma_next / sigma) ** 2 * (x - denoised))
    assert (guided - plain).abs().max() > 0.1


# Samples --------------------------------------------------------------------------------------------------------------
def test_low_density_samples_are_the_mixtures() -> None:
    """Path by path: the flow of one class, guided at diversity 1, ends where the flow of both classes does."""
    start = torch.randn(2000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config, labels = SamplingConfig(num_steps=48), rows(0, 2000)
    guided = Sampler(
        Networks(Exact(class_denoiser(0)), classifier=exact_classifier), config, GuidanceConfig(diversity=1.0)
    ).integrate(start, labels)
    both = Sampler(Networks(Exact(mixture)), config).integrate(start, labels)
    assert (guided - both).abs().max() < 1e-3
    assert (guided > sum(MEANS) / 2).double().mean() == pytest.approx(0.5, abs=0.05)  # half of class 0 looks like 1


def test_mnist32_diversity_lowers_confidence_and_fidelity_brings_it_back() -> None:
    networks, judge = dgfast.load("mnist32"), bundles.read("mnist32").load("features")
    labels = torch.arange(40) % 10

    def confidence(**weights: Any) -> float:
        config = SamplingConfig(num_steps=8, solver="dpmpp-2m")
        images = Sampler(networks, config, GuidanceConfig(**weights))(range(40), labels)
        with torch.no_grad():
            return -float(F.cross_entropy(judge(images), labels))

    plain, rare, kept = confidence(), confidence(diversity=3.0), confidence(diversity=3.0, fidelity=6.0)
    assert rare < kept - 0.2 and rare < plain - 0.5
    assert confidence(diversity=3.0, perceptual=True) > plain


# Runtimes -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_classifier(filled_net: Callable[..., nn.Module]) -> NoisyClassifier:
    keywords = {"image_size": 8, "in_channels": 1, "out_channels": 3, "model_channels": 16, "num_res_blocks": 1}
    more = {"attention_resolutions": [], "num_head_channels": 16, "channel_mult": [1, 1], "pool": "attention"}
    return NoisyClassifier(filled_net("EncoderUNetModel", keywords | more, "low/classifier/"))  # type: ignore[arg-type]


def both_terms(classifier: Any, normalize: str, read_at_t: bool = True) -> list[Guidance]:
    return [
        LowDensityGuidance(classifier, 3.0, normalize),
        PredictedCleanGuidance(classifier, 5.0, normalize, 2, read_at_t),
    ]


def labels_of_three(count: int, first: int) -> Tensor:
    return F.one_hot((torch.arange(count) + first) % 3, 3).float()


def relative_error(mine: Tensor, reference: Tensor) -> float:
    return ((mine - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)).max().item()


@torch.no_grad()
@pytest.mark.parametrize(("normalize", "read_at_t"), [*((how, True) for how in NORMALIZATIONS), ("none", False)])
def test_low_density_lowered_graph_equals_eager_on_fresh_inputs(
    tiny_net: NetFactory, tiny_classifier: NoisyClassifier, normalize: str, read_at_t: bool
) -> None:
    net = tiny_net(label_dim=3, channel_mult=[1])
    function = guided_denoiser(net, both_terms(tiny_classifier, normalize, read_at_t))
    example = (*batch(seed=6, size=4, pixels=8), labels_of_three(4, 0))
    graph = lower(trace(function, example), example, channels_last=True)
    x, sigma = batch(seed=7, size=4, pixels=8)
    inputs = x, sigma.flip(0), labels_of_three(4, 1)
    reference, plain = function(*inputs)[0], net(*inputs)
    assert relative_error(graph(*inputs)[0], reference) < 2e-5
    assert relative_error(plain.double(), reference) > 1e-3


def test_low_density_compiled_equals_eager(
    tiny_net: NetFactory, tiny_classifier: NoisyClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = guided_denoiser(tiny_net(label_dim=3, channel_mult=[1]), both_terms(tiny_classifier, "sample_l2"))
    run = cpu.build(function, (*batch(seed=8, size=2, pixels=8), labels_of_three(2, 0)))
    x, sigma = batch(seed=9, size=2, pixels=8)
    inputs = x, sigma.flip(0), labels_of_three(2, 1)
    with torch.no_grad():
        reference = function(*inputs)[0]
    assert relative_error(run(*inputs)[0], reference) < 2e-5


# Bad input ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fidelity": -1}, "at least 0"),
        ({"diversity": math.nan}, "diversity nan is not a finite number"),
        ({"fidelity": 1, "clean_time": "1"}, "clean_time '1' is not one of t, 0"),
        ({"diversity": 1, "normalize": "l2"}, "normalize 'l2' is not one of none, sample_l2"),
        ({"base_class": 0}, "base_class needs fidelity"),
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
    net, config = tiny_net(label_dim=2), SamplingConfig(num_steps=2)
    for networks, message in (
        (Networks(net), "needs a classifier network"),
        (Networks(net, classifier=lambda u: u), "needs a noise-aware classifier"),  # type: ignore[arg-type]
        (Networks(tiny_net(), classifier=exact_classifier), "conditional score network, a (target|base) class, or"),
    ):
        with pytest.raises(UserError, match=message):
            Sampler(networks, config, GuidanceConfig(**{term: 1.0}))


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
