"""At the very edges of windows, intervals and schedules: what `active` leaves out, `correct` would leave alone."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    WeightSchedule,
    gradient_keeping_denoiser,
    guided_denoiser,
)
from dgfast.guidance.classifier import class_log_probability
from dgfast.guidance.weights import weights
from dgfast.noise_levels import vp_sigma, vp_time


def level(tau: float) -> float:
    return float(vp_sigma(torch.tensor(tau, dtype=torch.float64)))


def guides(guidance: Any, sigma: float) -> bool:
    """Whether the guidance corrects an image at this noise level."""
    x, at = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
    direction, gate, _ = guidance.correct(x, at, torch.ones(1, 1), torch.zeros_like(x))
    return bool((direction * gate).any())


def conditional(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    return torch.zeros_like(x) if class_labels is not None else torch.ones_like(x)


def judge(u: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return u.sum(dim=(1, 2, 3))


def two_classes(u: Tensor, t: Tensor) -> Tensor:
    return torch.stack([u.sum(dim=(1, 2, 3)), -u.sum(dim=(1, 2, 3))], dim=1)


# Intervals of classifier-free guidance --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sigma", "acts"), [(0.5, False), (math.nextafter(0.5, 1), True), (2.0, True), (math.nextafter(2.0, 3), False)]
)
def test_interval_is_open_below_and_closed_above(sigma: float, acts: bool) -> None:
    guidance = ClassifierFreeGuidance(conditional, 3.0, (0.5, 2.0))
    assert guides(guidance, sigma) == guidance.active(sigma, sigma) == acts


@pytest.mark.parametrize(
    ("low", "high", "acts"),
    [(0.1, 0.5, False), (0.1, 0.6, True), (2.0, 3.0, True), (2.1, 3.0, False), (0.1, 9.0, True)],
)
def test_interval_is_judged_by_both_ends_of_a_churned_step(low: float, high: float, acts: bool) -> None:
    assert ClassifierFreeGuidance(conditional, 3.0, (0.5, 2.0)).active(low, high) == acts


@pytest.mark.parametrize(("scale", "scale_low", "above", "below"), [(1.0, 3.0, False, True), (3.0, 1.0, True, False)])
def test_branch_belongs_to_the_low_noise(scale: float, scale_low: float, above: bool, below: bool) -> None:
    guidance = ClassifierFreeGuidance(conditional, scale, scale_low=scale_low, branch=0.7)
    for sigma, acts in ((0.1, below), (0.7, below), (math.nextafter(0.7, 1), above), (5.0, above)):
        assert guides(guidance, sigma) == guidance.active(sigma, sigma) == acts
    assert guidance.active(0.6, 0.8)


def test_channels_beyond_those_guided_are_left_alone() -> None:
    guidance = ClassifierFreeGuidance(lambda x, s, y: 1 + 0 * x if y is None else 0 * x, 3.0, channels=2)
    x, sigma = torch.zeros(1, 3, 2, 2), torch.ones(1)
    direction, gate, _ = guidance.correct(x, sigma, torch.ones(1, 1), torch.zeros_like(x))
    assert (gate.view(-1, 1, 1, 1) * direction)[0, :, 0, 0].tolist() == [-2.0, -2.0, 0.0]


# The discriminator's window -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tau", "acts"), [(0.3 - 1e-5, False), (0.3 + 1e-5, True), (0.5, True), (0.7 - 1e-5, True), (0.7 + 1e-5, False)]
)
def test_window_acts_between_its_times(tau: float, acts: bool) -> None:
    guidance = DiscriminatorGuidance(judge, window=(0.3, 0.7))
    assert guides(guidance, level(tau)) == guidance.active(level(tau), level(tau)) == acts


def test_window_holds_a_level_on_its_edge_whatever_the_rounding() -> None:
    guidance = DiscriminatorGuidance(judge, window=(0.3, 0.7))
    for tau in (0.3, 0.7):
        for share in (1 - 1e-7, 1.0, 1 + 1e-7):
            assert guidance.active(share * level(tau), share * level(tau))
    assert guidance.active(level(0.1), level(0.3)) and guidance.active(level(0.7), level(0.9))
    assert not guidance.active(level(0.1), level(0.29)) and not guidance.active(level(0.71), level(0.9))
    assert guidance.inside(vp_sigma(torch.tensor([0.29, 0.31, 0.69, 0.71]))).tolist() == [False, True, True, False]


def test_guidance_of_no_weight_is_never_active() -> None:
    free = ClassifierFreeGuidance(conditional, 1.0, scale_low=1.0, branch=0.5)
    off = [
        DiscriminatorGuidance(judge, 0.0), ClassifierGuidance(two_classes, 0.0), free,
        ClassifierFreeGuidance(conditional, 1.0), Autoguidance(conditional, 1.0), LowDensityGuidance(two_classes, 0.0),
        PredictedCleanGuidance(two_classes, 0.0),
    ]  # fmt: skip
    assert not any(guidance.active(0.1, 1.0) for guidance in off)
    on = [
        DiscriminatorGuidance(judge, -1.0), ClassifierGuidance(two_classes, 0.5), Autoguidance(conditional, 0.0),
        LowDensityGuidance(two_classes, -1.0), PredictedCleanGuidance(two_classes, 2.0),
    ]  # fmt: skip
    assert all(guidance.active(0.1, 1.0) for guidance in on)


def test_guidance_costs_and_does_what_it_says_by_default() -> None:
    """(denoiser calls, gradients): the plan counts them, and the ancestral solver tells the two kinds apart by them."""
    costs = {
        DiscriminatorGuidance(judge): (0, 1), ClassifierGuidance(two_classes, 1.0): (0, 1),
        ClassifierFreeGuidance(conditional, 2.0): (1, 0), Autoguidance(conditional, 2.0): (1, 0),
        LowDensityGuidance(two_classes, 1.0): (0, 1), PredictedCleanGuidance(two_classes, 1.0): (0, 1),
    }  # fmt: skip
    assert all((guidance.evaluations, guidance.gradients) == cost for guidance, cost in costs.items())
    judged = DiscriminatorGuidance(judge)
    assert (judged.weight, judged.boost, judged.window, judged.published_window) == (1.0, None, (0.01, 1.0), False)
    assert PredictedCleanGuidance(two_classes, 1.0).read_at_t
    x, sigma = torch.full((1, 1, 1, 1), 9.0, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    for guided in (
        guided_denoiser(lambda x, s, y: x, ()),
        gradient_keeping_denoiser(lambda x, s, y: x, (), DiscriminatorGuidance(judge, 0.0)),
    ):
        assert float(guided(x, sigma, None)[0]) == 9.0  # not clipped


def test_discriminator_is_read_in_float32_and_believed_up_to_a_limit() -> None:
    """DG clips d to [1e-5, 1 - 1e-5]; beyond, the logit is the limit and has no gradient."""
    seen: list[torch.dtype] = []

    def steep(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        seen.append(u.dtype)
        return 100 * u.sum(dim=(1, 2, 3), keepdim=False)[:, None]  # [B, 1] will do too

    x = torch.tensor([-1.0, -0.01, 0.01, 1.0], dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = torch.ones(4, dtype=torch.float64)
    direction, _, log_ratio = DiscriminatorGuidance(steep).correct(x, sigma, None, x)
    limit = math.log((1 - 1e-5) / 1e-5)
    assert limit == pytest.approx(11.5129, abs=1e-4)
    assert log_ratio.tolist() == pytest.approx([-limit, -1 / 2**0.5, 1 / 2**0.5, limit], rel=1e-5)
    assert direction.flatten().tolist() == [0.0, 100.0, 100.0, 0.0]
    assert seen == [torch.float32] and direction.dtype == torch.float32


def test_weights_that_are_declared_are_inputs() -> None:
    class Own(Guidance):
        def active(self, sigma_low: float, sigma_high: float) -> bool:
            return True

        def correct(self, x: Tensor, sigma: Tensor, class_labels: Any, denoised: Tensor) -> Any:
            return denoised, sigma, None

    own: Any = Own()
    assert weights([own]) == {}  # nothing of it is declared: all of it is constant
    assert weights([ClassifierFreeGuidance(conditional, 2.0)]) == {"cfg_scale": 2.0}
    assert weights([DiscriminatorGuidance(judge, 0.5, boost=2.0)]) == {"dg_weight": 0.5, "dg_boost": 2.0}


def test_class_log_probability_is_one_float32_number_a_sample() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]])
    by_hand = logits - logits.exp().sum(1, keepdim=True).log()
    rows = torch.eye(3)[[2, 0]]
    torch.testing.assert_close(class_log_probability(logits, rows), by_hand[[0, 1], [2, 0]])
    torch.testing.assert_close(class_log_probability(logits, rows, label=1), by_hand[:, 1])
    assert class_log_probability(logits, torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    in_half = class_log_probability(logits.bfloat16(), rows)  # these logits lose nothing in it, their logarithm would
    torch.testing.assert_close(in_half, by_hand[[0, 1], [2, 0]])
    with pytest.raises(ValueError, match="needs class labels"):
        class_log_probability(logits, None)


# Schedules ------------------------------------------------------------------------------------------------------------
HUMP = ((0.2, 0.0), (0.4, 3.0), (0.6, 0.0))
BAND = ((0.3, 0.0), (0.3, 2.0), (0.5, 2.0), (0.5, 0.0))


@pytest.mark.parametrize(
    ("points", "low", "high", "acts"),
    [
        (HUMP, 0.1, 0.9, True),  # zero at both ends, and at every point but one
        (HUMP, 0.3, 0.35, True),  # between two points
        (HUMP, 0.1, 0.2, False),
        (HUMP, 0.1, 0.21, True),
        (HUMP, 0.61, 0.9, False),
        (HUMP, 0.6, 0.6, False),
        (BAND, 0.1, 0.9, True),
        (BAND, 0.1, 0.29, False),
        (BAND, 0.35, 0.4, True),
        (BAND, 0.51, 0.9, False),
        (((0.2, 1.0), (0.4, -1.0)), 0.3, 0.3, False),  # it passes through zero just there
        (((0.2, 1.0), (0.4, -1.0)), 0.29, 0.31, True),
        (((0.2, 0.0), (0.4, 1.0)), 0.5, 0.9, True),  # constant beyond the outer points
        (((0.2, 1.0), (0.4, 0.0)), 0.05, 0.1, True),
        (((0.2, 1.0), (0.4, 0.0)), 0.45, 0.9, False),
    ],
)
@pytest.mark.parametrize("kind", ["discriminator", "classifier"])
def test_schedule_is_active_where_it_is_not_zero(points: Any, low: float, high: float, acts: bool, kind: str) -> None:
    schedule = WeightSchedule(points)
    if acts or low != high:  # at one level, its factor may be rounding instead of 0
        assert schedule.active(level(low), level(high)) == acts
    guidance: Any = (
        DiscriminatorGuidance(judge, 1.0, (0.0, 1.0), schedule=schedule)
        if kind == "discriminator"
        else ClassifierGuidance(two_classes, 1.0, schedule=schedule)
    )
    for tau in torch.linspace(low + 1e-6, high - 1e-6, 21).tolist() if low < high else []:
        assert not guides(guidance, level(tau)) or guidance.active(level(low), level(high))


@given(
    steps=st.lists(st.tuples(st.floats(0.0, 0.3), st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0])), min_size=1, max_size=5),
    ends=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
)
def test_schedule_is_linear_between_its_points_and_active_where_it_is_not_zero(
    steps: list[tuple[float, float]], ends: tuple[float, float]
) -> None:
    taus = torch.tensor([step for step, _ in steps], dtype=torch.float64).cumsum(0).tolist()
    points = tuple((tau, factor) for tau, (_, factor) in zip(taus, steps, strict=True))
    schedule = WeightSchedule(points)

    def factor(tau: float) -> float:
        before = [p for p in points if p[0] <= tau]
        after = [p for p in points if p[0] > tau]
        if not before or not after:
            return before[-1][1] if before else after[0][1]
        (start, one), (end, two) = before[-1], after[0]
        return one + (tau - start) / (end - start) * (two - one)

    low, high = sorted(ends)
    sigma = torch.linspace(low, high, 25, dtype=torch.float64)
    sigma = vp_sigma(sigma)
    factors = schedule(sigma)
    tau = vp_time(sigma)
    clear = torch.tensor([all(abs(float(t) - p) > 1e-6 for p, _ in points) for t in tau])
    by_hand = torch.tensor([factor(float(t)) for t in tau], dtype=torch.float64)
    torch.testing.assert_close(factors[clear], by_hand[clear], rtol=1e-4, atol=1e-4)
    if by_hand[clear].abs().gt(1e-6).any():
        assert schedule.active(float(sigma[0]), float(sigma[-1]))


def test_schedule_without_points_is_one_everywhere() -> None:
    assert WeightSchedule()(torch.tensor([0.01, 1.0, 90.0])).tolist() == [1.0, 1.0, 1.0]
    assert WeightSchedule().active(0.01, 0.01)
