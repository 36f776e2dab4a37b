"""Guidance weights that change along the trajectory, as those of ADM-G++ do (arXiv 2211.17091)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.guidance.options import POINTS
from dgfast.vp import vp_time

if TYPE_CHECKING:
    from torch import Tensor


def reaches(interval: tuple[float, float], sigma_low: float, sigma_high: float) -> bool:
    """Whether any of these noise levels is inside of the interval, (low, high]; a low of 0 is no bound."""
    return sigma_high > (interval[0] or -math.inf) and sigma_low <= interval[1]


def inside(interval: tuple[float, float], sigma: Tensor) -> Tensor:
    """1 for the noise levels that are inside, 0 for the others, of sigma's shape and type."""
    return (((interval[0] or -math.inf) < sigma) & (sigma <= interval[1])).to(sigma.dtype)


@dataclass(frozen=True)
class WeightSchedule:
    """A factor on a guidance's weight: linear in the VP time tau between points, constant beyond the outer ones.

    Attributes:
        points: (tau, factor), by rising tau; two of the same tau are a jump. Without points the factor is 1.
    """

    points: POINTS = ()

    def __call__(self, sigma: Tensor) -> Tensor:
        """The factor at the noise levels sigma, of sigma's shape."""
        import torch

        return self._at(vp_time(sigma)) if self.points else torch.ones_like(sigma)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        """Whether the factor is other than 0 anywhere between two noise levels."""
        import torch

        if not self.points:
            return True
        low, high = ends = vp_time(torch.tensor([sigma_low, sigma_high], dtype=torch.float64))
        return bool(self._at(ends).any()) or any(low <= tau <= high and factor for tau, factor in self.points)

    def _at(self, tau: Tensor) -> Tensor:
        import torch

        factor = torch.full_like(tau, self.points[0][1])
        for (start, before), (end, after) in zip(self.points[:-1], self.points[1:], strict=True):
            share = ((tau - start) / (end - start)).clamp(0, 1) if end > start else (tau >= end).to(tau.dtype)
            factor = factor + share * (after - before)
        return factor


CONSTANT = WeightSchedule()
"""A factor of 1 at every noise level."""
