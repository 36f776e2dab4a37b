"""The one measure of how far two results are apart: it must not let a large sample, or output, hide a small one."""

import math

import pytest
import torch

from dgfast.graph.agreement import least_sizes, relative_error


def test_relative_error_is_a_share_of_the_same_sample() -> None:
    """Noise levels differ by 4 orders of magnitude in a batch; of the largest, errors in the others would be none."""
    reference = torch.stack([torch.full((1, 2, 2), 100.0), torch.full((1, 2, 2), 0.01)])
    wrong = reference.clone()
    wrong[1, 0, 0, 1] += 0.001
    assert relative_error(wrong, reference) == pytest.approx(0.1)
    wrong = reference.clone()
    wrong[0, 0, 1, 0] -= 5.0
    assert relative_error(wrong, reference) == pytest.approx(0.05)
    reference[1, 0, 0, 0] = -0.04  # the largest by its size, whatever the sign
    wrong = reference.clone()
    wrong[1, 0, 1, 1] += 0.01
    assert relative_error(wrong, reference) == pytest.approx(0.25)


def test_relative_error_of_one_number_a_sample_is_relative_to_one_at_least() -> None:
    reference = torch.tensor([1e7, 0.5, -4.0])
    assert relative_error(torch.tensor([1e7, 0.6, -4.0]), reference) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1e7, 0.5, -5.0]), reference) == pytest.approx(0.25)
    assert relative_error(torch.tensor([1.1e7, 0.5, -4.0]), reference) == pytest.approx(0.1)


def test_relative_error_of_what_cannot_be_compared_is_infinite() -> None:
    ones = torch.ones(2, 3)
    assert relative_error(ones, torch.ones(3, 2)) == math.inf
    assert relative_error(torch.ones(2, 1), ones) == math.inf  # not by broadcasting
    for bad in (math.nan, math.inf):
        wrong = ones.clone()
        wrong[1, 2] = bad
        assert relative_error(wrong, ones) == relative_error(ones, wrong) == math.inf
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    assert relative_error(torch.full((2, 3), 1e-9), torch.zeros(2, 3)) > 100.0
    assert relative_error(ones.half(), ones.double()) == 0.0


def test_relative_error_takes_the_least_size_where_a_sample_is_smaller() -> None:
    reference = torch.stack([torch.full((2,), 2.0), torch.full((2,), 0.1)])
    wrong = reference + 0.1
    assert relative_error(wrong, reference) == pytest.approx(1.0)
    assert relative_error(wrong, reference, torch.tensor([0.5, 0.5])) == pytest.approx(0.2)
    assert relative_error(wrong, reference, torch.tensor([0.01, 0.01])) == pytest.approx(1.0)


def test_least_size_of_a_difference_of_noisy_images_is_a_hundredth_of_them() -> None:
    """Of every step's result, and of the denoised image of a network that predicts noise."""
    x = torch.stack([torch.full((1, 2, 2), -80.0), torch.full((1, 2, 2), 3.0)])
    for predicts_noise, outputs in ((True, {"x_next", "denoised"}), (False, {"x_next"})):
        least = least_sizes(predicts_noise, {"x": x})
        assert least.keys() == outputs
        assert all(sizes.tolist() == pytest.approx([0.8, 0.03]) for sizes in least.values())
        assert least_sizes(predicts_noise, {"latents": x}) == {}
