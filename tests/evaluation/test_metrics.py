"""The metrics against scipy, numpy, prdc and torchmetrics on the same features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgfast.evaluation.collect import subset
from dgfast.evaluation.intervals import estimate, resamples
from dgfast.evaluation.moments import FrechetDistance, Moments, Sums, weighted_moments
from dgfast.evaluation.neighbours import NEIGHBOURS, Neighbours, kernel_distance


def _features(count: int, width: int, seed: int, at: float = 0.0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(width, width))
    return torch.from_numpy((generator.normal(size=(count, width)) @ mixing + at).astype(np.float32))


def _by_scipy(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """As EDM's fid.py writes it."""
    (mean, covariance), (mean_r, covariance_r) = (
        (f.double().numpy().mean(0), np.cov(f.double().numpy().T)) for f in (drawn, real)
    )
    root = scipy.linalg.sqrtm(covariance @ covariance_r)
    return float(np.square(mean - mean_r).sum() + np.trace(covariance + covariance_r - 2 * np.real(root)))


def _moments(features: torch.Tensor) -> Moments:
    sums = Sums()
    for part in features.split(7):
        sums.add(part)
    return sums.moments()


# A common offset of 1e4 would lose the covariance to cancellation, were it not taken about a value near the mean.
@pytest.mark.parametrize("at", [0.0, 1e4])
def test_moments_are_numpys_whatever_the_parts(at: float) -> None:
    features = _features(50, 5, 0, at)
    moments, values = _moments(features), features.double().numpy()
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(values.T), rtol=1e-9)


@pytest.mark.parametrize("count", [40, 200])
def test_frechet_distance_is_scipys(count: int) -> None:
    real, drawn = _features(300, 12, 0), _features(count, 12, 1, 0.3)
    value = FrechetDistance(_moments(real))(_moments(drawn))
    assert value == pytest.approx(_by_scipy(real, drawn), rel=1e-9)
    assert FrechetDistance(_moments(real))(_moments(real)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_gaussians_along_axes_is_the_closed_form() -> None:
    one, other = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64), torch.tensor([9.0, 4.0, 2.0], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    value = FrechetDistance(Moments(torch.zeros_like(one), one.diag()))(Moments(shift, other.diag()))
    assert value == pytest.approx(5 + (3 - 1) ** 2 + 0 + 2)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_weighted_moments_are_those_of_repeated_features(count: int, width: int, seed: int) -> None:
    features = _features(count, width, seed)
    times = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, count))
    times[0] += 2  # of fewer than two there is no covariance
    repeated = features.repeat_interleave(times, 0).double().numpy()
    moments = weighted_moments(features, times)
    np.testing.assert_allclose(moments.mean, repeated.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(repeated.T).reshape(width, width), rtol=1e-7, atol=1e-10)


def test_neighbours_are_prdcs_and_their_means_are_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    from prdc import compute_prdc

    real, drawn = _features(60, 4, 0), _features(50, 4, 1, 1.5)
    values, terms = Neighbours(real)(drawn)
    expected = compute_prdc(real.numpy(), drawn.numpy(), nearest_k=5)
    assert values == pytest.approx({name: float(expected[name]) for name in NEIGHBOURS})
    assert {name: each.mean() for name, each in terms.items()} == {
        name: values[name] for name in ("precision", "density")
    }
    assert 0 < values["precision"] < 1 and 0 < values["recall"] < 1


def test_kernel_distance_is_near_numpys_on_whole_sets() -> None:
    """The estimate of a subset has no bias: their mean is near the estimate of all (equation 4 of KID)."""
    real, drawn = _features(40, 4, 0), _features(40, 4, 1, 3.0)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return np.asarray((a.double().numpy() @ b.double().numpy().T / 4 + 1) ** 3)

    halves = [kernel_distance(real, drawn) for _ in range(2)]
    assert halves[0] == halves[1], "the subsets are the same in every run"
    off_diagonal = [kernel(one, one).sum() - np.trace(kernel(one, one)) for one in (real, drawn)]
    expected = sum(off_diagonal) / (40 * 39) - 2 * kernel(real, drawn).mean()
    assert halves[0] == pytest.approx(expected, rel=0.05)  # a mean over 100 subsets of 20


def test_kernel_distance_is_right_of_features_far_from_zero() -> None:
    """Third powers of ten thousand differ in digits that float32 does not have."""
    real, drawn = _features(40, 4, 0, 1e4), _features(40, 4, 1, 1e4)
    one, other = real.double().numpy(), drawn.double().numpy()
    kernel = [[(a @ b.T / 4 + 1) ** 3 for b in (one, other)] for a in (one, other)]
    expected = sum(kernel[k][k].sum() - np.trace(kernel[k][k]) for k in (0, 1)) / (40 * 39) - 2 * kernel[0][1].mean()
    assert kernel_distance(real, drawn) == pytest.approx(expected, rel=0.2)  # a mean over 100 subsets of 20


# Intervals ------------------------------------------------------------------------------------------------------------
def test_resamples_are_alike_for_equally_many_images() -> None:
    first, second = list(resamples(9, 3)), list(resamples(9, 3))
    assert all(bool((a == b).all()) and int(a.sum()) == 9 for a, b in zip(first, second, strict=True))
    assert not bool((first[0] == first[1]).all())


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    """mean +- 1.96 s / sqrt(n), where the mean of resamples has that law; and 0 width of what does not vary."""
    terms = np.random.default_rng(0).normal(3, 2, 400)
    means = np.array([float(counts.numpy() @ terms) / 400 for counts in resamples(400, 2000)])
    found = estimate(float(terms.mean()), means)
    half = 1.96 * terms.std() / 20
    assert found.low == pytest.approx(terms.mean() - half, abs=0.02)
    assert found.high == pytest.approx(terms.mean() + half, abs=0.02)
    assert estimate(1.0, np.empty(0)).low is None
    constant = estimate(2.0, np.full(10, 5.0))
    assert (constant.low, constant.high) == (2.0, 2.0), "the bias of the resamples is taken off"


def test_a_subset_is_even_and_the_same_every_time() -> None:
    chosen = subset(1000, 100)
    assert len({*chosen.tolist()}) == 100 and chosen.tolist() == sorted(chosen.tolist()) == subset(1000, 100).tolist()
    assert 400 < chosen.mean() < 600 and subset(5, 100).tolist() == list(range(5))
