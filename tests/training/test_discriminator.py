"""The two objectives of a discriminator against closed forms, and what is said of one that is of no use."""

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgfast.training.discriminator import Trial, judge_by_sigma, told_apart_by_labels, verdict
from dgfast.vp import vp_alpha, vp_time

REAL, MODEL = 0.5, 0.8  # standard deviations of the data and of what the model takes them for


class WrongDenoiser(nn.Module):
    """The exact denoiser of N(0, MODEL^2)."""

    img_channels, img_resolution, label_dim, sigma_data = 1, 8, 0, REAL
    sigma_min, sigma_max = 0.0, math.inf

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return x * (MODEL**2 / (MODEL**2 + sigma.view(-1, 1, 1, 1) ** 2))

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))


@dataclass(frozen=True)
class ExactTrial(Trial):
    """The log-ratio of the two Gaussians in the place of a network's, times what the network holds."""

    def logit(self, net: nn.Module, u: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        x = (u / vp_alpha(sigma).view(-1, 1, 1, 1)).flatten(1)
        real, model = ((deviation**2 + sigma**2).view(-1, 1) for deviation in (REAL, MODEL))
        ratio = (x**2 / 2 * (1 / model - 1 / real) + (model / real).log() / 2).sum(1)
        return net.scale * ratio.float()  # type: ignore[operator]


@pytest.fixture
def trial() -> ExactTrial:
    torch.manual_seed(11)  # not the judge's, whose noise would be these very numbers
    real, generated = (deviation * torch.randn(400, 1, 8, 8) for deviation in (REAL, MODEL))
    labels = torch.zeros(400).long()
    return ExactTrial((real, labels), (generated, labels), None, 0, vp_time, (0.1, 5.0))


def test_the_true_log_ratio_makes_the_wrong_denoiser_right(trial: ExactTrial) -> None:
    x0, labels = trial.real
    sigma = torch.full((400,), 0.7, dtype=torch.float64)
    torch.manual_seed(3)
    error, correction = trial.correction(Scale(1.0), WrongDenoiser(), x0, sigma, labels)
    torch.manual_seed(3)
    x = x0 + 0.7 * torch.randn(x0.shape)
    assert torch.allclose(error + correction, x * (REAL**2 / (REAL**2 + 0.7**2)) - x0, atol=1e-5)


@pytest.mark.parametrize("objective", ["cross-entropy", "denoising"])
def test_both_objectives_are_lowest_at_the_true_log_ratio(trial: ExactTrial, objective: str) -> None:
    loss = trial.cross_entropy if objective == "cross-entropy" else trial.corrected_denoising(WrongDenoiser())
    net = Scale(1.0)
    torch.manual_seed(5)
    loss(net, 2000).backward()
    assert net.scale.grad is not None and abs(float(net.scale.grad)) < 0.02
    values = {}
    for scale in (0.0, 0.5, 1.0, 1.5):
        torch.manual_seed(5)
        values[scale] = float(loss(Scale(scale), 2000).detach())
    assert min(values, key=values.__getitem__) == 1.0


def test_judged_by_sigma_sees_the_gain_where_there_is_one(trial: ExactTrial) -> None:
    judged = judge_by_sigma(trial, Scale(1.0), WrongDenoiser(), (0.5, 20.0))
    assert judged["0.5"]["accuracy"] > 0.8 and judged["0.5"]["loss"] < 0.5
    # Of the Gaussians' exact denoisers: error of the right one over error of the wrong one.
    shrinks = [deviation**2 / (deviation**2 + 0.25) for deviation in (REAL, MODEL)]
    right, wrong = (REAL**2 * (1 - shrink) ** 2 + 0.25 * shrink**2 for shrink in shrinks)
    assert judged["0.5"]["denoising"] == pytest.approx(right / wrong, rel=0.02)
    assert judged["20"]["denoising"] == pytest.approx(1, abs=0.01) and judged["20"]["loss"] > 0.6


def judged(accuracy: float, loss: float, denoising: float = 0.99) -> dict[str, float]:
    return {"accuracy": accuracy, "loss": loss, "denoising": denoising}


@pytest.mark.parametrize(
    ("by_sigma", "words"),
    [
        ({"0.2": judged(0.5, 0.6935), "1": judged(0.51, 0.693)}, "cannot be told apart"),
        ({"0.2": judged(1.0, 0.01), "1": judged(0.9, 0.2)}, "trivially (over 99% at sigma 0.2)"),
        ({"0.2": judged(0.7, 0.6, 1.002), "1": judged(0.6, 0.65, 1.0)}, "error is 1.0010 of the unguided"),
        ({"0.002": judged(1.0, 0.01), "1": judged(0.7, 0.6)}, None),
        ({"0.2": judged(0.7, 0.6), "1": judged(0.5, 0.694)}, None),
    ],
    ids=["blind", "sharp", "harmful", "grain", "useful"],
)
def test_verdict_is_given_where_a_discriminator_is_of_no_use(
    by_sigma: dict[str, dict[str, float]], words: str | None
) -> None:
    found = verdict(by_sigma)
    assert found is None if words is None else words in (found or "")


def test_verdict_on_a_corrector_does_not_ask_what_it_tells_apart() -> None:
    by_sigma = {"0.2": judged(0.5, 0.9, 0.99), "1": judged(0.5, 0.7, 0.998)}
    assert verdict(by_sigma, divergence=True) is None
    of_no_use = {"1": judged(0.5, 0.6, 1.0)}
    for divergence, remedy in ((True, "Train longer"), (False, "Try --objective kl")):
        assert re.search(f"does not bring the denoiser closer.* {remedy}", verdict(of_no_use, divergence) or "")


def test_labels_that_tell_generated_images_are_told() -> None:
    rng = np.random.default_rng(0)
    real, alike, one = np.arange(1000) % 10, rng.integers(0, 10, 300), np.full(300, 3)
    assert told_apart_by_labels(real, alike, 10) is None and told_apart_by_labels(real, one, 0) is None
    # 9 in 10 real images are of a class that is never generated: 0.95 is right.
    said = told_apart_by_labels(real, one, 10)
    assert said is not None and "95%" in said and "of class 0, 1, 2, 4, 5 none is generated" in said
    # So few of each that shares differ by chance.
    assert told_apart_by_labels(rng.integers(0, 500, 1000), rng.integers(0, 500, 1000), 500) is None
