"""Classifier guidance against closed forms and ADM's own way of writing it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.guidance import (
    OUTSIDE_WINDOW,
    ClassifierGuidance,
    guided_denoiser,
)
from tests.support.guidance import (
    CLASSES,
    batch,
    correction_of,
    exact_classifier,
    mixture,
)

NetFactory = Callable[..., Any]


@pytest.mark.parametrize("label", [0, 1])
def test_guidance_exact_classifier_turns_the_mixtures_denoiser_into_the_classs(label: int) -> None:
    x, sigma = batch(seed=4)
    labels = F.one_hot(torch.full((len(x),), label), 2).float()
    denoised, log_ratio = guided_denoiser(mixture, [ClassifierGuidance(exact_classifier, 1.0)])(x, sigma, labels)
    exact = CLASSES[label](x, sigma, None)
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
