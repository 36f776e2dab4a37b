"""Mean and covariance of features, and the Frechet distance between two of them.

FID (Heusel et al., arXiv 1706.08500, equation 6) is this distance in Inception's features, FD-DINOv2 (Stein et al.,
arXiv 2306.04675) in DINOv2's. All in float64, with the unbiased covariance, as EDM computes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8192
"""Of features that are float64 at once."""


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor

    @property
    def width(self) -> int:
        """D, how many numbers a feature has."""
        return len(self.mean)


class Sums:
    """What the moments of features come from that are seen a few at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._at = self._first = self._second = torch.zeros(0)

    @property
    def width(self) -> int | None:
        """D; None before the first features."""
        return len(self._at) if self.count else None

    def add(self, features: Tensor) -> None:
        """Features [n, D]."""
        values = features.double()
        if not self.count:
            width = values.shape[1]
            self._at = values.mean(0)  # near the mean, where squares do not cancel
            self._first, self._second = values.new_zeros(width), values.new_zeros(width, width)
        values = values - self._at
        self._first += values.sum(0)
        self._second += values.T @ values
        self.count += len(values)

    def moments(self) -> Moments:
        """Of two features at least."""
        mean = self._first / self.count
        covariance = (self._second - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Moments(self._at + mean, covariance)


def weighted_moments(features: Tensor, counts: Tensor) -> Moments:
    """Moments of features [N, D] of which each stands there so many times, [N]."""
    centre = features[:_ROWS].double().mean(0)
    first, second, total = torch.zeros_like(centre), centre.new_zeros(len(centre), len(centre)), counts.sum()
    for rows, times in zip(features.split(_ROWS), counts.double().split(_ROWS), strict=True):
        values = rows.double() - centre
        first += times @ values
        second += values.T @ (times[:, None] * values)
    mean = first / total
    return Moments(centre + mean, (second - total * torch.outer(mean, mean)) / (total - 1))


class FrechetDistance:
    """|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2)), to a reference.

    The trace of the root is that of (C_r^(1/2) C C_r^(1/2))^(1/2), which is symmetric; C_r's root is taken once.
    """

    def __init__(self, reference: Moments) -> None:
        self._reference = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def __call__(self, moments: Moments) -> float:
        between = torch.linalg.eigvalsh(self._root @ moments.covariance @ self._root)
        mean = (moments.mean - self._reference.mean).square().sum()
        traces = moments.covariance.trace() + self._reference.covariance.trace()
        return float(mean + traces - 2 * between.clamp(min=0).sqrt().sum())
