"""Guidances by the prediction without class: what each adds, against its definition written down another way."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import GuidanceConfig, Sampler, SamplingConfig, UserError
from dgfast.guidance import (
    AdaptiveProjectedGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierFreeGuidance,
    FrequencyDecoupledGuidance,
    Guidance,
    MagnitudeAwareGuidance,
    TangentialGuidance,
    guided_denoiser,
)
from dgfast.guidance.adaptive_projected import projected
from dgfast.guidance.cfg_plus_plus import step_factors
from dgfast.guidance.frequency_decoupled import decoupled, pyramid, rebuilt
from dgfast.guidance.memory import remembering
from dgfast.guidance.spaces import SPACES, frame, prediction
from dgfast.guidance.steps import of_step
from dgfast.guidance.tangential import dropped
from dgfast.guidance.zero_star import fitted
from dgfast.networks import Networks
from tests.support.guidance import CLASSES, Exact, column, mixture

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LEVELS = (20.0, 3.0, 0.7, 0.1, 0.0)
SAMPLING = SamplingConfig(num_steps=5, solver="euler", sigma_max=20.0, sigma_min=0.05)


class Conditional(Exact):
    """Class 1 of the two, or both together where no label is given."""

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.denoiser(x, sigma, None) if class_labels is None else CLASSES[1](x, sigma, None)


NETWORKS = Networks(denoiser=Conditional(mixture))
LABELS = torch.tensor([[0.0, 1.0]])


def images(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D_c, D_u, x and sigma of four samples at levels far apart."""
    generator = torch.Generator().manual_seed(seed)
    plain, change, noise = torch.randn(3, 4, 2, size, size, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.02, 0.5, 4.0, 70.0], dtype=torch.float64)
    return plain, plain + 0.4 * change, plain + column(sigma) * noise, sigma


def network(plain: Tensor, reference: Tensor) -> Net:
    return lambda x, sigma, labels: reference if labels is None else plain


def guided(guidance: Guidance, plain: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    function = guided_denoiser(network(plain, torch.empty(0)), [guidance])
    return function(x, sigma, torch.ones(len(x), 1))[0]


def mixes(net: Any, scale: float = 3.0) -> list[Guidance]:
    return [
        AdaptiveProjectedGuidance(net, scale, eta=0.3, threshold=4.0),
        AdaptiveProjectedGuidance(net, scale, space="flow", over="pixel"),
        TangentialGuidance(net, scale),
        CFGZeroStar(net, scale),
        MagnitudeAwareGuidance(net, scale, alpha=1.0),
        FrequencyDecoupledGuidance(net, scale, scale_low=1.0, parallel=0.5),
    ]


@pytest.mark.parametrize("index", range(6))
def test_mix_acts_on_each_sample_alone_and_not_at_scale_one(index: int) -> None:
    plain, reference, x, sigma = images()
    whole = guided(mixes(network(plain, reference))[index], plain, x, sigma)
    for k in range(len(x)):
        one = slice(k, k + 1)
        net = network(plain[one], reference[one])
        torch.testing.assert_close(guided(mixes(net)[index], plain[one], x[one], sigma[one]), whole[one])
        assert (whole[one] - plain[one]).abs().max() > 0.05
    assert torch.equal(guided(mixes(network(plain, reference), 1.0)[index], plain, x, sigma), plain)
    inside = replace(mixes(network(plain, reference))[index], interval=(0.5, 5.0))  # type: ignore[type-var]
    expected = torch.stack([plain[0], plain[1], whole[2], plain[3]])
    torch.testing.assert_close(guided(inside, plain, x, sigma), expected)
    assert inside.active(0.4, 0.6) and not inside.active(0.1, 0.5) and not inside.active(6.0, 9.0)


@pytest.mark.parametrize("space", SPACES)
def test_space_is_affine_in_the_denoised_image(space: str) -> None:
    plain, _, x, sigma = images()
    origin, unit = frame(space, x, sigma)
    torch.testing.assert_close(origin - unit * prediction(space, plain, x, sigma), plain)
    eps, s = (x - plain) / column(sigma), column(sigma)
    wanted = {"x0": plain, "eps": eps, "v": (eps - s * plain) / (1 + s**2).sqrt(), "flow": eps - plain}[space]
    torch.testing.assert_close(prediction(space, plain, x, sigma), wanted)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("turn", [1.0, -1.5, 0.3])
def test_tangential_damping_keeps_the_first_singular_vector(space: str, turn: float) -> None:
    plain, reference, x, sigma = images()
    reference = turn * reference if space == "x0" else reference
    kept = reference + dropped(plain, reference, x, sigma, space)
    mine = prediction(space, kept, x, sigma).flatten(1)
    pair = torch.stack([prediction(space, each, x, sigma).flatten(1) for each in (plain, reference)], 1)
    first = torch.linalg.svd(pair, full_matrices=False).Vh[:, 0]
    torch.testing.assert_close(mine, (pair[:, 1] * first).sum(1, keepdim=True) * first)


def test_tangential_damping_leaves_a_reference_alone_where_nothing_is_first() -> None:
    plain, reference = torch.zeros(2, 1, 2, 1, 2, dtype=torch.float64)
    plain[0, 0, 0, 0] = reference[0, 0, 0, 1] = 1.0
    assert not dropped(plain, reference, plain, torch.ones(2), "x0").any()


@pytest.mark.parametrize("space", SPACES)
def test_cfg_zero_star_fits_the_reference_best(space: str) -> None:
    plain, reference, x, sigma = images()
    p, mine, q = (
        prediction(space, each, x, sigma) for each in (plain, fitted(plain, reference, x, sigma, space), reference)
    )
    assert ((p - mine) * q).sum((1, 2, 3)).abs().max() < 1e-9 * (q**2).sum((1, 2, 3)).max()
    share = mine / q
    torch.testing.assert_close(share, share[:, :1, :1, :1].expand_as(share))


def test_projection_takes_away_what_is_parallel_and_limits_the_norm() -> None:
    plain, reference, _, _ = images()
    d = plain - reference
    across = projected(d, plain, 0.0, 0.0)
    assert (across * plain).sum((1, 2, 3)).abs().max() < 1e-9
    torch.testing.assert_close(projected(d, plain, 1.0, 0.0), d)
    torch.testing.assert_close(projected(d, plain, 0.25, 0.0), 0.25 * d + 0.75 * across)
    short = projected(d, plain, 1.0, 2.0)
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((4,), 2.0, dtype=torch.float64))
    assert torch.equal(projected(0 * d, 0 * plain, 0.0, 2.0), 0 * d)


def test_frequency_bands_add_up_and_with_one_scale_are_plain_guidance() -> None:
    plain, reference, _, _ = images(size=12)
    bands = pyramid(plain, 3)
    assert [band.shape[-1] for band in bands] == [12, 6, 3]
    torch.testing.assert_close(rebuilt(bands), plain)
    torch.testing.assert_close(decoupled(plain, reference, [2.0, 2.0, 2.0]), 2 * (plain - reference))
    flat = decoupled(plain + 1, plain, [0.0, 1.0])  # one grey level is low frequency alone
    torch.testing.assert_close(flat, torch.ones_like(flat))
    chequered = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    chequered = plain + chequered[:, None] * chequered
    torch.testing.assert_close(decoupled(chequered, plain, [1.0, 0.0]), chequered - plain)
    with pytest.raises(UserError, match=r"2 bands needs images whose sides divide by 2, .* these have 9"):
        pyramid(plain[..., :9, :9], 2)


def test_magnitude_aware_scale_shrinks_with_the_correction() -> None:
    plain, reference, x, sigma = images()
    corrections = []
    for share in (0.1, 1.0):
        net = network(plain, plain + share * (reference - plain))
        guidance = MagnitudeAwareGuidance(net, 5.0, space="x0")
        corrections.append((guided(guidance, plain, x, sigma) - plain).flatten(1).norm(dim=1) / share)
    assert (corrections[1] < 0.5 * corrections[0]).all()
    plain_guidance = ClassifierFreeGuidance(network(plain, reference), 5.0)
    still = MagnitudeAwareGuidance(network(0 * plain, 0 * plain), 5.0, space="x0")  # an untrained network's
    assert torch.equal(guided(still, 0 * plain, x, sigma), 0 * plain)
    undamped = MagnitudeAwareGuidance(network(plain, reference), 5.0, alpha=0.0)
    torch.testing.assert_close(guided(undamped, plain, x, sigma), guided(plain_guidance, plain, x, sigma))


def test_step_is_found_by_its_noise_level() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    for second, levels in ((False, LEVELS[:-1]), (True, LEVELS[1:])):
        for dtype in (torch.float32, torch.float64):
            for rounding in (1 - 1e-6, 1.0, 1 + 1e-6):
                found = of_step(values, LEVELS, second, torch.tensor(levels, dtype=dtype) * rounding)
                assert found.tolist() == values
    churned = of_step(values, LEVELS, False, 1.4 * torch.tensor(LEVELS[:-1]))
    assert churned.tolist() == values and of_step(values, LEVELS, False, torch.tensor([1e-3])).tolist() == [4.0]


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_renoises_with_the_unconditional_prediction(scale: float) -> None:
    latents = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = LABELS.expand(3, 2)
    sampler = Sampler(NETWORKS, SAMPLING, GuidanceConfig(cfgpp_scale=scale))
    assert sampler.score_evaluations == 10, "the prediction without class is needed at scale 1 too"
    x, net = sampler.first_state(latents), NETWORKS.denoiser
    levels = [*(step.sigma for step in sampler.steps), 0.0]
    for sigma, sigma_next in pairwise(levels):
        level = torch.full((3,), sigma, dtype=torch.float64)
        conditional, unconditional = net(x, level, rows), net(x, level, None)
        mixed = unconditional + scale * (conditional - unconditional)
        x = mixed + sigma_next / sigma * (x - unconditional)
    torch.testing.assert_close(sampler.integrate(latents, rows), x)


def test_cfg_plus_plus_has_one_scale_at_both_points_of_a_step() -> None:
    first, second = (CFGPlusPlus(NETWORKS.denoiser, 0.5).along(LEVELS, point) for point in (False, True))
    plain, reference, x, _ = images()
    for guidance, levels in ((first, LEVELS[:-1]), (second, LEVELS[1:])):
        gate = guidance.mixed(x, torch.tensor(levels, dtype=torch.float64), plain, reference)[1]
        assert gate.tolist() == pytest.approx([0.5 * factor - 1 for factor in step_factors(LEVELS)])
    off = replace(first, scale=torch.tensor([-1.0]))
    assert not off.mixed(x, torch.tensor([3.0]), plain, reference)[1].any()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_zero_init_starts_lower_at_both_points(solver: str) -> None:
    """In rectified flow's coordinates a step without prediction changes nothing: x sigma' / sigma, nearly."""
    sampling = replace(SAMPLING, solver=solver)
    latents = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(NETWORKS, sampling, GuidanceConfig(zero_star_scale=2.0, zero_init_steps=2))
    states: list[Tensor] = []
    sampler.integrate(latents, LABELS.expand(3, 2), on_step=lambda step, x, *_: states.append(x))
    levels = [step.sigma for step in sampler.steps]
    x = sampler.first_state(latents)
    if solver == "euler":  # the slope changes within a step, so that only Euler's is known in closed form
        for k in range(2):
            x = x + (levels[k + 1] - levels[k]) * x / (1 + levels[k])
            torch.testing.assert_close(states[k], x)
    else:
        torch.testing.assert_close(states[1], x * (1 + levels[2]) / (1 + levels[0]), rtol=0.02, atol=0)
    plain = Sampler(NETWORKS, sampling, GuidanceConfig(zero_star_scale=2.0)).integrate(latents, LABELS.expand(3, 2))
    assert (states[-1] - plain).abs().max() > 1e-3


# Momentum -------------------------------------------------------------------------------------------------------------
def test_momentum_goes_from_first_point_to_first_point_and_begins_anew() -> None:
    latents = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, net, beta = LABELS.expand(3, 2), NETWORKS.denoiser, -0.5
    drawn = {}
    for solver in ("euler", "heun"):
        config = GuidanceConfig(apg_scale=3.0, apg_eta=1.0, apg_momentum=beta)
        sampler = Sampler(NETWORKS, replace(SAMPLING, solver=solver), config)
        levels = [*(step.sigma for step in sampler.steps), 0.0]
        x, m = sampler.first_state(latents), torch.zeros(3, 1, 1, 1, dtype=torch.float64)

        def slope(x: Tensor, sigma: float, m: Tensor) -> tuple[Tensor, Tensor]:
            level = torch.full((3,), sigma, dtype=torch.float64)
            conditional = net(x, level, rows)
            m = conditional - net(x, level, None) + beta * m
            return (x - conditional - 2.0 * m) / sigma, m

        for sigma, sigma_next in pairwise(levels):
            d, m = slope(x, sigma, m)
            euler = x + (sigma_next - sigma) * d
            if solver == "heun" and sigma_next:
                second, _ = slope(euler, sigma_next, m)
                d = (d + second) / 2
            x = x + (sigma_next - sigma) * d
        for _ in range(2):
            drawn[solver] = sampler.integrate(latents, rows)
            torch.testing.assert_close(drawn[solver], x)
    without = Sampler(NETWORKS, SAMPLING, GuidanceConfig(apg_scale=3.0, apg_eta=1.0)).integrate(latents, rows)
    assert (without - drawn["euler"]).abs().max() > 1e-3


def test_momentum_leaves_the_memory_alone_outside_of_the_interval() -> None:
    latents = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = GuidanceConfig(apg_scale=3.0, apg_momentum=-0.5, guidance_interval=(0.2, 5.0))
    sampler = Sampler(NETWORKS, replace(SAMPLING, solver="heun"), config)
    assert {len(step.predictor) for step in sampler.steps} == {0, 1}
    assert sampler.integrate(latents, LABELS.expand(3, 2)).isfinite().all()


def test_momentum_goes_with_a_reused_gradient() -> None:
    """Both the gradient that is carried over and the memory come out of one function."""
    config = GuidanceConfig(apg_scale=3.0, apg_momentum=-0.5, dg_weight=1.0, dg_every=2)
    networks = replace(NETWORKS, discriminator=lambda u, t, y: -(u**2).sum((1, 2, 3)))
    sampler = Sampler(networks, SAMPLING, config)
    latents = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = Sampler(NETWORKS, SAMPLING, replace(config, dg_weight=0.0, dg_every=1))
    both = [one.integrate(latents, LABELS.expand(3, 2)) for one in (sampler, alone)]
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_memory_is_an_argument_and_a_result() -> None:
    plain, reference, x, sigma = images()
    net = network(plain, reference)
    function = remembering(partial(guided_denoiser, net), [AdaptiveProjectedGuidance(net, 3.0, momentum=0.5)])
    _, _, first = function(x, sigma, LABELS, torch.zeros_like(x))
    _, _, second = function(x, sigma, LABELS, first)
    torch.testing.assert_close(first, plain - reference)
    torch.testing.assert_close(second, 1.5 * (plain - reference))


# What has no meaning --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"cfg_scale": 2.0, "apg_scale": 2.0}, "apg_scale and cfg_scale both mix in the prediction without class"),
        ({"cfgpp_scale": 1.0, "tcfg_scale": 2.0}, "cfgpp_scale and tcfg_scale both mix in"),
        ({"cfgpp_scale": 1.5}, "cfgpp_scale 1.5 must lie between 0 and 1; beyond, there is cfg_scale"),
        ({"apg_scale": 2.0, "apg_momentum": -1.0}, "apg_momentum -1.0 must lie between -1 and 1"),
        ({"apg_scale": 2.0, "apg_threshold": -1.0}, "apg_threshold -1.0 must be at least 0"),
        ({"mambo_scale": 2.0, "mambo_alpha": -1.0}, "mambo_alpha -1.0 must be at least 0"),
        (
            {"zero_star_scale": 2.0, "zero_init_steps": 1, "guidance_interval": (0.1, 5.0)},
            "zero_init_steps are at the highest noise levels, which guidance_interval leaves out",
        ),
        ({"tcfg_scale": 2.0, "tcfg_space": "latent"}, "tcfg_space 'latent' is not one of x0, eps, v, flow"),
    ],
)
def test_mix_without_meaning_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        GuidanceConfig(**options)


def test_zero_init_leaves_a_step_that_predicts() -> None:
    guidance = CFGZeroStar(NETWORKS.denoiser, 2.0, zero_steps=len(LEVELS) - 2)
    assert guidance.along(LEVELS).zero_steps == len(LEVELS) - 2
    with pytest.raises(UserError, match=f"zero_init_steps {len(LEVELS) - 1} of {len(LEVELS) - 1} steps leaves none"):
        replace(guidance, zero_steps=len(LEVELS) - 1).along(LEVELS)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"apg_scale": 2.0, "apg_momentum": -0.5}, "apg_momentum"),
        ({"cfgpp_scale": 0.5}, "cfgpp_scale"),
        ({"zero_star_scale": 2.0, "zero_init_steps": 1}, "zero_init_steps"),
    ],
)
def test_mix_from_step_to_step_is_refused_where_steps_look_back(
    solver: str, options: dict[str, float], named: str
) -> None:
    with pytest.raises(UserError, match=f"{named} has no meaning for {solver}: take one of heun, euler, ddim"):
        Sampler(NETWORKS, replace(SAMPLING, solver=solver), GuidanceConfig(**options))  # type: ignore[arg-type]


def test_two_memories_are_refused() -> None:
    twice = [AdaptiveProjectedGuidance(NETWORKS.denoiser, 2.0, momentum=beta) for beta in (0.1, 0.2)]
    with pytest.raises(UserError, match="two guidances remember"):
        Sampler(NETWORKS, SAMPLING, twice)


@pytest.mark.parametrize(
    "options", [{"apg_scale": 2.0}, {"cfgpp_scale": 0.5}, {"tcfg_scale": 2.0}, {"fdg_scale_low": 2.0},
                {"mambo_scale": 2.0}, {"zero_star_scale": 2.0}]
)  # fmt: skip
def test_mix_needs_a_network_that_knows_both_predictions(options: dict[str, float]) -> None:
    net: Any = Conditional(mixture)
    net.null_class = None
    with pytest.raises(UserError, match="trained without labels too"):
        Sampler(Networks(denoiser=net), SAMPLING, GuidanceConfig(**options))  # type: ignore[arg-type]
    net.label_dim = 0
    with pytest.raises(UserError, match="needs a conditional score network"):
        Sampler(Networks(denoiser=net), SAMPLING, GuidanceConfig(**options))  # type: ignore[arg-type]


def test_projection_of_pixels_needs_several_channels() -> None:
    with pytest.raises(UserError, match="apg_over pixel: this network's images have one channel"):
        Sampler(NETWORKS, SAMPLING, GuidanceConfig(apg_scale=2.0, apg_over="pixel"))


def test_frequency_decoupled_guidance_needs_a_size_to_halve() -> None:
    with pytest.raises(UserError, match="these have 1"):
        Sampler(NETWORKS, SAMPLING, GuidanceConfig(fdg_scale_low=2.0))
