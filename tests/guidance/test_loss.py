"""Guidance by a loss of the user's own, through the denoiser and not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgfast import Sampler, SamplingConfig, UserError
from dgfast.guidance import LossGuidance, guided_denoiser
from dgfast.networks import Networks
from tests.support.guidance import Exact, Gaussian, batch, column, mixture, rows

NET = Gaussian(0.3, 0.25)


def toward(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    return ((x_0 - 0.9) ** 2).sum((1, 2, 3)) / 2


def guided(guidance: LossGuidance, x: Tensor, sigma: Tensor) -> Tensor:
    return guided_denoiser(NET, [guidance])(x, sigma, None)[0]


@settings(max_examples=20)
@given(size=st.integers(1, 4), pixels=st.integers(1, 3), weight=st.floats(-2, 2), seed=st.integers(0, 99))
def test_loss_guides_by_its_gradient_through_the_denoiser_or_at_it(
    size: int, pixels: int, weight: float, seed: int
) -> None:
    x, sigma = batch(seed, size, pixels)
    plain, jacobian = NET(x, sigma, None), column(0.25 / (0.25 + sigma**2))
    pull = column(weight * sigma**2) * (0.9 - plain)
    torch.testing.assert_close(guided(LossGuidance(toward, weight), x, sigma), plain + jacobian * pull)
    torch.testing.assert_close(guided(LossGuidance(toward, weight, through_network=False), x, sigma), plain + pull)


@pytest.mark.parametrize("through", [True, False])
def test_loss_of_freedoms_length_moves_each_sample_by_a_share_of_its_noise(through: bool) -> None:
    x, sigma = batch(2)
    plain = NET(x, sigma, None)
    for scale in (1.0, 1e6):  # the loss's own scale does not count
        guidance = LossGuidance(lambda *a, s=scale: s * toward(*a), 0.02, through, normalize="rms")
        moved = guided(guidance, x, sigma) - plain
        sizes = [v.square().mean((1, 2, 3)).sqrt() for v in (moved, x - plain)]
        torch.testing.assert_close(sizes[0], 0.02 * sizes[1])
        assert ((moved * (0.9 - plain)).sum((1, 2, 3)) > 0).all()
    alone = guided(guidance, x[2:3], sigma[2:3])
    torch.testing.assert_close(alone, plain[2:3] + moved[2:3])
    still = guided(LossGuidance(lambda x, t, x_0: 0 * toward(x, t, x_0), 0.02, through, "rms"), x, sigma)
    assert torch.equal(still, plain)  # a gradient of 0 has no direction


class DataConsistency:
    """The published protocol of guidances through a denoiser: (x, t, x_0) -> a term of the score of x, of x's shape."""

    def __init__(self, mask: Tensor, y: Tensor, std_y: float, gamma: float) -> None:
        self.mask, self.y, self.std_y, self.gamma = mask, y, std_y, gamma

    def __call__(self, x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        variance = column(self.std_y**2 + self.gamma * t**2)
        error = ((self.mask * (x_0 - self.y)) ** 2 / (2 * variance)).sum()
        (gradient,) = torch.autograd.grad(outputs=error, inputs=x)
        return -gradient


def test_loss_takes_the_published_protocol_as_it_is() -> None:
    x, sigma = batch(4)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    own = DataConsistency(mask, torch.full((2, 2), 0.8, dtype=torch.float64), 0.1, 1.0)
    plain, jacobian = NET(x, sigma, None), column(0.25 / (0.25 + sigma**2))
    wanted = plain + column(sigma**2 / (0.01 + sigma**2)) * jacobian * mask * (0.8 - plain)
    torch.testing.assert_close(guided(LossGuidance(own, 1.0), x, sigma), wanted)


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            lambda x, t, x_0: toward(x, t, x_0).mean(),
            r"one number a sample, \[6\], or a term.*; it is \[\]",
        ),
        (lambda x, t, x_0: toward(x, t, x_0)[:, None], r"it is \[6, 1\]"),
        (lambda x, t, x_0: 1.0, "it is float"),
        (lambda x, t, x_0: torch.fft.fft2(x_0).sum((1, 2, 3)), r"it is \[6\] of torch.complex128"),
        (lambda x, t, x_0: toward(x, t, x_0.detach()), "does not depend on x_0"),
    ],
)
@pytest.mark.parametrize("through", [True, False])
def test_loss_that_is_not_one_number_a_sample_is_refused(loss: Any, line: str, through: bool) -> None:
    with pytest.raises(UserError, match=line):
        guided(LossGuidance(loss, 1.0, through), *batch(1))


@pytest.mark.parametrize("through", [True, False])
def test_loss_that_changes_its_arguments_changes_nobody_elses(through: bool) -> None:
    def careless(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        t.mul_(3)
        return toward(x, t, x_0.clamp_(-0.2, 0.2))

    def careful(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        return toward(x, t, x_0.clamp(-0.2, 0.2))

    (x, sigma), after = batch(3), batch(3)[1]
    both = [guided(LossGuidance(loss, 0.3, through), x, sigma) for loss in (careless, careful)]
    assert torch.equal(*both) and torch.equal(sigma, after)


@pytest.mark.parametrize(
    ("loss", "weight", "line"),
    [
        (None, 1.0, r"the loss is a NoneType; give a function \(x, t, x_0\)"),
        (toward, None, "weight None must be a finite number"),
        (toward, "1", "weight '1' must be"),
        (toward, float("nan"), "weight nan must be"),
    ],
)
def test_loss_of_no_function_or_no_weight_is_refused(loss: Any, weight: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        LossGuidance(loss, weight)


def by_x(x: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """A term of the score that the loss differentiates itself, by the noisy images."""
    return torch.autograd.grad(toward(x, t, x_0).sum(), x)[0]


def test_loss_that_looks_at_x_without_the_network_is_told_to_look_at_x_0() -> None:
    x, sigma = batch(1)
    x.requires_grad_()
    with pytest.raises(UserError, match="on something else that has a gradient, and not on x_0"):
        guided(LossGuidance(lambda x, t, x_0: toward(x, t, x), 1.0, through_network=False), x, sigma)
    with pytest.raises(UserError, match=r"takes a gradient of its own.*x_0 alone has one") as refused:
        guided(LossGuidance(by_x, 1.0, through_network=False), x.detach(), sigma)
    assert "\n" not in refused.value.message
    torch.testing.assert_close(guided(LossGuidance(by_x, 0.0), x, sigma), NET(x, sigma, None))


def test_loss_normalisation_of_no_name_is_refused() -> None:
    with pytest.raises(UserError, match="normalize 'l2' is not one of none, rms"):
        LossGuidance(toward, 1.0, normalize="l2")


def test_loss_of_weight_nothing_is_the_plain_sampler_bit_for_bit_and_costs_are_counted() -> None:
    networks, sampling = Networks(Exact(mixture)), SamplingConfig(num_steps=6, sigma_max=20.0, sigma_min=0.05)
    latents = batch(0)[0][:, :, :1, :1]
    plain = Sampler(networks, sampling).integrate(latents, rows(0, 6))
    for weight, through, costs in ((0.0, True, (0, 0)), (1.0, True, (11, 0)), (1.0, False, (0, 11))):
        sampler = Sampler(networks, sampling, [LossGuidance(toward, weight, through)])
        assert (sampler.score_backwards, sampler.guidance_gradients) == costs
        assert torch.equal(sampler.integrate(latents, rows(0, 6)), plain) == (weight == 0)
