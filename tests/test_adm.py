"""ADM beyond its recorded numbers: published sizes, ancestral sampling where closed forms exist, bundles, runtimes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from torch import Tensor, nn

from dgfast import bundle as bundles
from dgfast import convert, nets, sample
from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.errors import UserError
from dgfast.guidance import (
    ClassifierGuidance,
    DiscriminatorGuidance,
    WeightSchedule,
    guided_denoiser,
    guided_posterior,
)
from dgfast.nets.adm_unet import PUBLISHED
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks, load
from dgfast.noise_levels import coordinates
from dgfast.runtimes import compiled
from dgfast.runtimes.graph import lower, trace
from dgfast.sampler import Sampler
from dgfast.solvers import ancestral_step, ddim_step, euler_step

NetFactory = Callable[..., Any]
TINY: dict[str, Any] = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "learn_sigma": True,
    "class_cond": True, "attention_resolutions": "4", "num_head_channels": 32, "use_scale_shift_norm": True,
    "resblock_updown": True, "use_new_attention_order": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def adm(filled_net: NetFactory) -> DDPMPrecond:
    """A conditional ADM for 8 x 8 images."""
    return DDPMPrecond(filled_net("create_model", TINY, "tiny/adm/"), 8, 3, 1000).eval()


@pytest.fixture(scope="module")
def classifier(filled_net: NetFactory) -> NoisyClassifier:
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 1000, "num_res_blocks": 1}
    keywords = shape | {"attention_resolutions": [], "channel_mult": [1, 2], "num_head_channels": 32}
    return NoisyClassifier(filled_net("EncoderUNetModel", keywords | {"pool": "attention"}, "tiny/adm_c/"))


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_hot(*classes: int, of: int = 1000) -> Tensor:
    return torch.eye(of)[list(classes)]


# Networks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "millions"),
    [("adm-64", 296), ("adm-128", 422), ("adm-256", 554), ("adm-256-uncond", 553), ("adm-512", 559)],
)
def test_adm_published_networks_have_the_published_sizes(name: str, millions: int) -> None:
    """arXiv 2105.05233, tables of hyperparameters."""
    with torch.device("meta"):
        net = nets.build("create_model", **PUBLISHED[name])
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6) == millions


def test_adm_attention_orders_are_one_map_with_its_rows_in_another_order(filled_net: NetFactory) -> None:
    old, new = (
        filled_net("create_model", TINY | {"use_new_attention_order": order}, "order/") for order in (False, True)
    )
    x, t, labels = images(2, 3, 8, 8).float(), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    turned = nets.build("create_model", **TINY).eval()
    state = {
        name: value.unflatten(0, (-1, 3, 32)).transpose(0, 1).flatten(0, 2) if ".qkv." in name else value
        for name, value in old.state_dict().items()
    }
    turned.load_state_dict(state)
    assert (old(x, t, labels) - new(x, t, labels)).abs().max() > 1e-3  # two heads where attention stands
    torch.testing.assert_close(turned(x, t, labels), old(x, t, labels), rtol=1e-4, atol=1e-5)


def test_adm_heads_may_be_others_on_the_way_up() -> None:
    net = nets.build("create_model", **TINY | {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4})
    heads = [(name.split(".")[0], m.num_heads) for name, m in net.named_modules() if hasattr(m, "num_heads")]
    assert set(heads) == {("input_blocks", 2), ("middle_block", 2), ("output_blocks", 4)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"num_head_channels": 48}, "do not split"), ({"channel_mult": ""}, "no published channel_mult for image_size 8")],
)
def test_adm_refuses_shapes_that_do_not_exist(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build("create_model", **TINY | wrong)


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_adm_spatial_pools_read_the_means_of_every_block(filled_net: NetFactory, pool: str) -> None:
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1}
    net = filled_net(
        "EncoderUNetModel", shape | {"attention_resolutions": [], "channel_mult": [1, 2], "pool": pool}, "p/"
    )
    blocks: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *a: blocks.append(a[2])) for m in (*net.input_blocks, net.middle_block)]
    logits = net(images(2, 3, 8, 8).float(), torch.tensor([3.0, 700.0]))
    for hook in hooks:
        hook.remove()
    means = torch.cat([block.mean(dim=(2, 3)) for block in blocks], dim=1)
    assert means.shape == (2, 32 + 32 + 32 + 64 + 64) and logits.shape == (2, 5)
    hidden = torch.nn.functional.linear(means, net.out[0].weight, net.out[0].bias)
    if pool == "spatial_v2":
        hidden = torch.nn.functional.group_norm(hidden, 32, net.out[1].weight, net.out[1].bias)
        hidden = torch.nn.functional.silu(hidden)
    wanted = torch.nn.functional.linear(
        hidden.relu() if pool == "spatial" else hidden, net.out[-1].weight, net.out[-1].bias
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


class Exact(nn.Module):
    """The perfect raw network for pixels of this mean and variance, and v that says where the variance lies."""

    def __init__(self, levels: Tensor, variance: float, mean: float, v: float | None, predict_xstart: bool) -> None:
        super().__init__()
        self.levels, self.variance, self.mean, self.v, self.predict_xstart = levels, variance, mean, v, predict_xstart
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, u: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        self.seen.append(timesteps)
        sigma = self.levels[timesteps.long()].view(-1, 1, 1, 1)
        x = u * (1 + sigma**2).sqrt()
        clean = (self.variance * x + sigma**2 * self.mean) / (self.variance + sigma**2)
        out = clean if self.predict_xstart else (x - clean) / sigma
        return out if self.v is None else torch.cat([out, torch.full_like(out, self.v)], dim=1)


def exact(
    schedule: str = "linear", variance: float = 0.25, mean: float = 0.3, v: float | None = None, **more: Any
) -> Any:
    predict_xstart = more.get("predict_xstart", False)
    raw = Exact(nl.ddpm_levels(schedule, 1000), variance, mean, v, predict_xstart)
    return DDPMPrecond(raw, 2, 1, 0, noise_schedule=schedule, learn_sigma=v is not None, **more)


@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_adm_denoiser_denoises_at_the_nearest_timestep(schedule: str, predict_xstart: bool) -> None:
    net = exact(schedule, predict_xstart=predict_xstart)
    for timestep in (0, 1, 500, 999):
        sigma = net.levels[[timestep] * 2] * (1 + 1e-5)
        x = net.round_sigma(sigma).view(-1, 1, 1, 1) * images(2, 1, 2, 2)
        noise = net.levels[timestep] ** 2
        wanted = (0.25 * x + noise * 0.3) / (0.25 + noise)
        denoised = net(x, net.round_sigma(sigma))
        assert (denoised - wanted).abs().max() < 3e-7 * max(1, float(noise.sqrt()))
        assert net.model.seen[-1].tolist() == [timestep] * 2 == net.timesteps(sigma).tolist()
        assert torch.equal(net.round_sigma(sigma), net.levels[[timestep] * 2])


def test_adm_timesteps_are_rescaled_to_a_thousand() -> None:
    net = DDPMPrecond(nn.Linear(1, 1), 2, 1, 0, steps=250, rescale_timesteps=True)
    assert net.timesteps(net.levels).tolist() == [4.0 * k for k in range(250)]
    torch.testing.assert_close(net.time(net.levels) * 999, net.timesteps(net.levels))


def test_adm_unknown_class_is_the_networks_own_or_an_error() -> None:
    raw = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="no unknown class"):
        DDPMPrecond(raw, 2, 1, 3).labels(None, 2)
    raw.null_class = 3  # type: ignore[assignment]
    net = DDPMPrecond(raw, 2, 1, 3)
    assert net.labels(None, 2).tolist() == [3, 3]  # type: ignore[union-attr]
    assert net.labels(torch.tensor([[0.0, 0, 1], [0, 0, 0]]), 2).tolist() == [2, 3]  # type: ignore[union-attr]


# Noise levels ---------------------------------------------------------------------------------------------------------
def test_adm_schedules_are_the_published_ones() -> None:
    linear, cosine = (nl.ddpm_levels(schedule, 1000) for schedule in nl.NOISE_SCHEDULES)
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(1 / (1 + linear.numpy() ** 2), np.cumprod(1 - beta), rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(1 / (1 + cosine.numpy()[:900] ** 2), f[1:901] / f[0], rtol=1e-9)  # where 0.999 is far
    for schedule, steps in (("linear", 10), ("cosine", 0), ("sine", 10)):
        with pytest.raises(ValueError, match="schedule"):
            nl.ddpm_levels(schedule, steps)


@given(steps=st.integers(1, 1200), data=st.data())
def test_adm_respacing_keeps_as_many_of_each_section_as_asked_for(steps: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(steps, 4)))
    counts = [data.draw(st.integers(1, steps // sections)) for _ in range(sections)]
    kept = nl.respaced_timesteps(",".join(map(str, counts)), steps)
    assert kept == sorted(set(kept)) and len(kept) == sum(counts)
    edges = [sum(len(part) for part in np.array_split(range(steps), sections)[:k]) for k in range(sections + 1)]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        inside = [t for t in kept if low <= t < high]
        assert len(inside) == count and inside[0] == low and (count == 1 or inside[-1] == high - 1)


def test_adm_respacing_of_ddim_has_one_whole_stride() -> None:
    assert nl.respaced_timesteps("ddim25", 1000) == list(range(0, 1000, 40))
    assert nl.respaced_timesteps("", 7) == list(range(7))


@pytest.mark.parametrize(
    "respacing", ["ddim999", "1001", "500,501", "ddim", "ddim5,5", "25.0", "10,", "0", "-3", "all"]
)
def test_adm_respacing_that_does_not_divide_is_refused(respacing: str) -> None:
    with pytest.raises(UserError, match=f"--respacing {respacing}: ") as caught:
        nl.respaced_timesteps(respacing, 1000)
    assert "\n" not in caught.value.message


# The ancestral solver -------------------------------------------------------------------------------------------------
def steps_of(schedule: str = "linear", respacing: str = "12") -> Any:
    """(sigma, sigma_next, log-variances) of an ancestral run."""
    sigmas = nl.respaced_levels(respacing, nl.ddpm_levels(schedule, 1000))
    return zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], nl.posterior_log_variances(sigmas), strict=True)


@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
def test_adm_small_variance_is_exact_for_data_without_spread(schedule: str) -> None:
    """Then x has exactly noise sigma_next around that point after each step, whatever the step's length."""
    for sigma, sigma_next, (least, _) in steps_of(schedule):
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        variance, levels = least.exp() * one, (sigma, sigma_next)
        of_noise = ancestral_step(0.3 * one, 0.3 * one, 0 * one, variance, *levels, one) - 0.3
        of_x = ancestral_step((0.3 + sigma) * one, 0.3 * one, 0 * one, variance, *levels, 0 * one) - 0.3
        torch.testing.assert_close((of_noise**2 + of_x**2).sqrt(), one * sigma_next, rtol=1e-10, atol=1e-12)
        assert sigma_next == 0 or of_noise > 0


@pytest.mark.parametrize("schedule", nl.NOISE_SCHEDULES)
def test_adm_large_variance_is_exact_for_data_of_unit_variance(schedule: str) -> None:
    """Then x in VP coordinates is a stationary AR(1) process of unit variance with coefficient sqrt(1 - beta)."""
    for sigma, sigma_next, (_, most) in steps_of(schedule):
        one, alpha, alpha_next = (
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            nl.vp_alpha(sigma),
            nl.vp_alpha(sigma_next),
        )
        x = one / alpha
        denoised = x / (1 + sigma**2)
        mean = alpha_next * ancestral_step(x, denoised, 0 * one, most.exp() * one, sigma, sigma_next, 0 * one)
        drawn = alpha_next * ancestral_step(x, denoised, 0 * one, most.exp() * one, sigma, sigma_next, one)
        torch.testing.assert_close(mean, one * (1 - most.exp()).sqrt(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((drawn - mean) ** 2, one * (most.exp() if sigma_next > 0 else 0.0))


@pytest.mark.parametrize(("v", "fixed"), [(None, "small"), (None, "large"), (-1.0, "small"), (1.0, "large"), (0.5, "")])
def test_adm_trajectory_of_gaussian_data_has_its_closed_form(v: float | None, fixed: str) -> None:
    """Mean and standard deviation over many pixels, against the recursion of the two along the steps."""
    variance, mean, pixels = 0.25, 0.3, 5000
    net = exact(v=v)
    config = SamplingConfig(solver="ddpm", respacing="8", **({"fixed_variance": fixed} if fixed else {}))
    noise = iter(images(8, pixels, 1, 2, 2, seed=1))
    x = Sampler(Networks(net), config).integrate(images(pixels, 1, 2, 2).float(), None, noise.__next__)
    at, spread = 0.0, None
    share = {None: float(fixed == "large"), -1.0: 0.0, 1.0: 1.0, 0.5: 0.75}[v]
    for sigma, sigma_next, (least, most) in steps_of(respacing="8"):
        spread = (1 + sigma**2) if spread is None else spread
        shrink, kept = variance / (variance + sigma**2), (sigma_next / sigma) ** 2
        factor = shrink + kept * (1 - shrink)
        at = mean + factor * (at - mean)
        fresh = (least + share * (most - least)).exp() * (1 + sigma_next**2) if sigma_next > 0 else 0.0
        spread = factor**2 * spread + fresh
    assert spread is not None
    count = 4 * pixels
    assert abs(float(x.mean() - at)) < 5 * math.sqrt(spread / count)
    assert abs(float(x.var() / spread) - 1) < 5 * math.sqrt(2 / count)


def test_adm_ddim_without_noise_is_eulers_step_in_sigma() -> None:
    config, x, denoised = SamplingConfig(), 40 * images(3, 1, 2, 2), images(3, 1, 2, 2, seed=1)
    t, t_next = (torch.full((3, 1, 1, 1), level, dtype=torch.float64) for level in (40.0, 25.0))
    euler = euler_step(x, denoised, t, t_next, coordinates(config, 0.002, 80.0))
    torch.testing.assert_close(ddim_step(x, denoised, t, t_next, None, 0.0), euler, rtol=1e-12, atol=1e-12)
    noise = images(3, 1, 2, 2, seed=2)
    torch.testing.assert_close(ddim_step(x, denoised, t, t_next, noise, 0.0), euler, rtol=1e-12, atol=1e-12)


def test_adm_ddim_with_all_its_noise_is_the_ancestral_step_of_small_variance() -> None:
    x, denoised, noise = (images(2, 1, 2, 2, seed=seed) for seed in range(3))
    for sigma, sigma_next, (least, _) in steps_of():
        variance = least.exp() * torch.ones_like(x)
        ancestral = ancestral_step(sigma * x, denoised, 0 * x, variance, sigma, sigma_next, noise)
        ddim = ddim_step(sigma * x, denoised, sigma, sigma_next, noise, 1.0)
        torch.testing.assert_close(ddim, ancestral, rtol=1e-10, atol=1e-12)


# Guidance in the ancestral form ---------------------------------------------------------------------------------------
SLOPE = images(1, 1, 2, 2, seed=3)


def ramp(u: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """A log-ratio whose gradient is SLOPE, within the clamp for the u that are used here."""
    return (SLOPE.to(u.dtype) * u).sum(dim=(1, 2, 3))


def bounds_of(log_least: float, log_most: float, batch: int) -> tuple[Tensor, Tensor]:
    return torch.full((batch,), log_least).double(), torch.full((batch,), log_most).double()


@pytest.mark.parametrize("v", [None, -1.0, 0.2, 1.0])
def test_adm_gradient_guidance_shifts_the_mean_by_variance_times_gradient(v: float | None) -> None:
    net, guidance = exact(v=v), DiscriminatorGuidance(ramp, 1.7)
    sigma = net.levels[[400, 800]]
    x = sigma.view(-1, 1, 1, 1) * images(2, 1, 2, 2)
    function = guided_posterior(net, [guidance])
    denoised, shift, variance, log_ratio = function(x, sigma, None, *bounds_of(-6.0, -3.0, 2))
    share = 0.0 if v is None else (v + 1) / 2
    wanted = torch.full_like(x, math.exp(-6 + 3 * share))
    torch.testing.assert_close(variance, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(shift, 1.7 * wanted * SLOPE, rtol=1e-6, atol=1e-12)
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
    class Twice:
        evaluations, gradients = 1, 0

        def active(self, sigma_low: float, sigma_high: float) -> bool:
            return True

        def correct(self, x: Tensor, sigma: Tensor, labels: Any, denoised: Tensor) -> Any:
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
            assert (mine - reference).abs().max() <= 2e-5 * (reference.std() + 1e-6)


def test_adm_traced_and_lowered_ancestral_function_equals_eager(adm: DDPMPrecond, classifier: NoisyClassifier) -> None:
    function = guided_posterior(adm, [ClassifierGuidance(classifier, 100.0, adm.time)], clip=True)
    example = images(2, 3, 8, 8), adm.levels[[5, 6]], one_hot(1, 2), *bounds_of(-4.0, -2.0, 2)
    check_ancestral_function(lower(trace(function, example), example, channels_last=True), function, adm)


def test_adm_compiled_sampling_equals_eager(filled_net: NetFactory) -> None:
    """On nets of one resolution: the fewer kinds of layers, the fewer minutes of C++."""
    flat = TINY | {"channel_mult": "1", "attention_resolutions": "1"}
    net = DDPMPrecond(filled_net("create_model", flat, "a/"), 8, 3, 1000)
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 1000, "num_res_blocks": 1}
    keywords = shape | {"attention_resolutions": [], "channel_mult": [1], "num_head_channels": 32}
    keywords |= {"use_scale_shift_norm": True, "resblock_updown": True}
    networks = Networks(net, classifier=NoisyClassifier(filled_net("EncoderUNetModel", keywords, "b/")), time=net.time)
    config = SamplingConfig(solver="ddpm", respacing="4", clip_denoised=True)
    guidance = GuidanceConfig(classifier_scale=100.0)
    eager, fast = (Sampler(networks, config, guidance, runtime=runtime) for runtime in (None, compiled.build))
    fast.prepare(2)
    (built,) = fast._functions.values()
    assert networks.classifier is not None
    function = guided_posterior(net, [ClassifierGuidance(networks.classifier, 100.0, net.time)], clip=True)
    check_ancestral_function(built, function, net)
    assert (fast([1, 2]) - eager([1, 2])).abs().max() < 1e-4


# Bundles --------------------------------------------------------------------------------------------------------------
def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_adm_checkpoint_becomes_a_bundle_and_images(
    filled_net: NetFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, "adm-8", TINY)  # OpenAI's smallest has 296 million weights
    raw = filled_net("create_model", TINY, "tiny/adm/")
    torch.save({name: value.half() for name, value in raw.state_dict().items()}, tmp_path / "8x8_diffusion.pt")
    output = run(convert.main, tmp_path / "8x8_diffusion.pt", "--role", "score", "--out", tmp_path / "b")
    assert "score DDPMPrecond" in output
    bundle = bundles.read(tmp_path / "b")
    assert bundle.sampling == SamplingConfig(solver="ddpm", respacing="250", clip_denoised=True)
    net: Any = load(bundle).denoiser
    assert (net.img_resolution, net.label_dim, net.learn_sigma, net.noise_schedule) == (8, 1000, True, "linear")
    x, t, y = images(2, 3, 8, 8).float(), torch.tensor([9.0, 600.0]), torch.tensor([1, 2])
    torch.testing.assert_close(net.model(x, t, y), raw(x, t, y), rtol=2e-2, atol=2e-2)  # half-precision weights

    def drawn(*options: str) -> tuple[np.ndarray, dict[str, Any]]:
        out = tmp_path / "-".join(options)
        run(sample.main, "--bundle", tmp_path / "b", "--seeds", "0-1", "--format", "npz", "--out", out, *options)
        (shard,) = out.glob("*.npz")
        return np.load(shard)["images"], json.loads((out / "manifest.json").read_text())["job"]["sampling"]

    ancestral, job = drawn("--respacing", "4")
    assert ancestral.shape == (2, 8, 8, 3) and (job["solver"], job["respacing"]) == ("ddpm", "4")
    as_steps, job = drawn("--steps", "4", "--clip-denoised")
    assert np.array_equal(as_steps, ancestral) and job["respacing"] == "4" and job["clip_denoised"] is True
    _, job = drawn("--solver", "heun", "--grid", "edm", "--steps", "4", "--clip-denoised=false")
    assert job["respacing"] is None and job["clip_denoised"] is False


def test_adm_schedules_of_weights_survive_the_bundle_file(tmp_path: Path) -> None:
    guidance = GuidanceConfig(dg_weight=1.0, dg_schedule=((0.1, 0.0), (0.5, 2.0)), guidance_interval=(0.1, math.inf))
    bundle = replace(bundles.read("mnist32"), folder=tmp_path, nets={}, guidance=guidance)
    bundles.write(bundle)
    assert bundles.read(tmp_path).guidance == guidance
