"""Guidances from outside: handed to a sampler as they are, of every kind that a guided denoiser knows."""

from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from dgfast import GuidanceConfig, Sampler, SamplingConfig, UserError
from dgfast.guidance import ClassifierFreeGuidance, Guidance, Repair, guided_denoiser, guided_posterior
from dgfast.job import Job
from dgfast.networks import Networks
from tests.support.guidance import Exact, Gaussian, batch, column, mixture, rows

EULER = SamplingConfig(num_steps=6, solver="euler", sigma_max=20.0, sigma_min=0.05)


@dataclass(frozen=True, eq=False)
class Brighter(Guidance):
    """D' = D + by."""

    by: float | Tensor
    levels: tuple[float, ...] = ()
    second: bool = False

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.by)

    def correct(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor) -> Any:
        return torch.ones_like(denoised), self.by * torch.ones_like(sigma), None

    def along(self, levels: Any, second: bool = False) -> Self:
        return replace(self, levels=tuple(levels), second=second)


@dataclass(frozen=True, eq=False)
class Times(Repair):
    """D' + (factor - 1) (D' - D)."""

    factor: float

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return self.factor != 1

    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        return plain + self.factor * (mixed - plain)


@dataclass(frozen=True, eq=False)
class Pull(Guidance):
    """Toward `target` by the loss (D - target)^2 / 2 through the denoiser: D' = D - weight sigma^2 J^T (D - target)."""

    target: float
    weight: float
    backwards = 1

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return True

    def correct(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor) -> Any:
        loss = ((denoised - self.target) ** 2 / 2).sum()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        return -gradient, self.weight * sigma**2, None


NETWORKS = Networks(denoiser=Exact(mixture))


def test_own_guidance_acts_at_both_points_beside_a_configuration() -> None:
    latents = batch(0)[0][:, :, :1, :1]
    for solver in ("euler", "heun"):
        sampling = replace(EULER, solver=solver)
        plain = Sampler(NETWORKS, sampling).integrate(latents, rows(0, 6))
        brighter = Sampler(NETWORKS, sampling, [GuidanceConfig(), Brighter(0.25)])
        shifted = brighter.integrate(latents, rows(0, 6))
        assert (shifted - plain).min() > 0.2
        assert repr(brighter).endswith("guidance: Brighter; on cpu")
        assert all(len(step.predictor) == 1 for step in brighter.steps)
        assert all(len(step.corrector or ()) == 1 for step in brighter.steps[:-1]) == (solver == "heun")


def test_own_guidance_hears_the_levels_of_the_plan_and_its_point() -> None:
    steps = Sampler(NETWORKS, replace(EULER, solver="heun"), [Brighter(0.25)]).steps
    levels = (*(step.sigma for step in steps), 0.0)
    (first,), (second,) = steps[0].predictor, steps[0].corrector or ()
    assert isinstance(first, Brighter) and isinstance(second, Brighter)
    assert first.levels == second.levels == levels and (first.second, second.second) == (False, True)


@pytest.mark.parametrize(
    ("guidance", "line"),
    [
        ([Brighter], "the class Brighter: make one of it"),
        ([lambda x: x], "a function; give a GuidanceConfig, or a list of guidances"),
        ([GuidanceConfig(), GuidanceConfig()], "2 GuidanceConfigs; put their options into one"),
    ],
    ids=["class", "function", "twice"],
)
def test_what_is_no_guidance_is_refused(guidance: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Sampler(NETWORKS, EULER, guidance)


def test_kinds_come_in_their_order_whatever_the_order_in_which_they_are_listed() -> None:
    net, (x, sigma) = Gaussian(0.3, 0.25), batch(1)
    plain = net(x, sigma, None)
    kinds = [Pull(0.9, 1.0), Times(3.0), Brighter(0.5), Times(2.0)]
    jacobian = column(0.25 / (0.25 + sigma**2))
    pulled = column(sigma**2) * jacobian * (0.9 - plain)
    for listed in (kinds, kinds[::-1]):
        for clip in (False, True):
            mixed = plain + 6.0 * 0.5
            expected = (mixed.clamp(-1, 1) if clip else mixed) + pulled
            denoised, _ = guided_denoiser(net, listed, clip)(x, sigma, None)
            torch.testing.assert_close(denoised, expected)
            assert not denoised.requires_grad
            none = torch.full_like(sigma, -torch.inf)
            torch.testing.assert_close(guided_posterior(net, listed, clip)(x, sigma, None, none, none)[0], expected)


def test_guidances_through_the_denoiser_share_one_forward() -> None:
    calls = []

    def net(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        calls.append(x.requires_grad)
        return x / (1 + column(sigma) ** 2)

    x, sigma = batch(2)
    with torch.no_grad():
        one, _ = guided_denoiser(net, [Pull(0.9, 1.0), Pull(0.1, 0.5), Brighter(0.5)])(x, sigma, None)
    assert calls == [True]
    apart = [guided_denoiser(net, [guidance])(x, sigma, None)[0] for guidance in (Pull(0.9, 1.0), Pull(0.1, 0.5))]
    plain = net(x, sigma, None)
    torch.testing.assert_close(one, sum(apart) - plain + 0.5)


def test_two_guidances_of_one_declaration_guide_both_and_are_refused_in_a_file() -> None:
    """Whose input has one name: the weight of the second would be that of the first too."""
    one = ClassifierFreeGuidance(NETWORKS.denoiser, 2.0)
    job = Job(NETWORKS, EULER, [GuidanceConfig(cfg_scale=2.0), one])
    assert [len(step.predictor) for step in job.steps] == [2] * len(job.steps)
    with pytest.raises(UserError, match="two guidances have the input cfg_scale: an exported file has it once"):
        job.exported()


def test_backward_passes_are_counted() -> None:
    sampler = Sampler(NETWORKS, replace(EULER, solver="heun"), [Pull(0.3, 1.0)])
    assert (sampler.score_evaluations, sampler.score_backwards, sampler.guidance_gradients) == (11, 11, 0)
