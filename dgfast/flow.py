"""Paths of flow matching, and what a velocity on one says (SiT, arXiv 2401.08740, section 2).

    x(t) = s(t) clean + spread(t) noise,   velocity = E[dx/dt | x(t)],   t = 0 noise, t = 1 data

In terms of dgfast x(t) / s(t) is an image with noise of standard deviation sigma(t) = spread(t) / s(t), infinite
at t = 0 of a path that begins in pure noise. SiT calls s alpha_t and spread sigma_t. Pure functions, meant for float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgfast.noise_levels import Coordinates
from dgfast.vp import BETA_MAX, BETA_MIN, vp_alpha, vp_sigma, vp_time

EPSILON = 1e-3
"""How far from an end of the path the samplers of SiT stay where they cannot look at it."""


class Path(ABC):
    """One path, and the linear maps between velocity, clean image, noise and score at a point of it.

    Attributes:
        name: in bundles. begins_in_noise: nothing of an image is in its first state.
    """

    name: ClassVar[str]
    begins_in_noise: ClassVar[bool] = True

    @abstractmethod
    def s(self, t: Tensor) -> Tensor:
        """The share of the image; SiT's alpha_t."""

    @abstractmethod
    def s_deriv(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def spread(self, t: Tensor) -> Tensor:
        """The share of the noise; SiT's sigma_t."""

    @abstractmethod
    def spread_deriv(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is sigma, which may be infinite."""

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at time t, relative to the image."""
        return self.spread(t) / self.s(t)

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return -self._turn(t) / self.s(t) ** 2

    def interval(self, prediction: str) -> tuple[float, float]:
        """The times from which and to which SiT's ODE samplers go with a network that predicts that."""
        margin = 0.0 if prediction == "velocity" else EPSILON
        return margin, 1 - margin

    def _turn(self, t: Tensor) -> Tensor:
        """s' spread - s spread', the determinant of (clean, noise) -> (x, velocity); above 0."""
        return self.s_deriv(t) * self.spread(t) - self.s(t) * self.spread_deriv(t)

    def clean(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The denoised images of a velocity; finite at infinite noise too."""
        return (self.spread(t) * velocity - self.spread_deriv(t) * x) / self._turn(t)

    def noise(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The noise of a velocity."""
        return (self.s_deriv(t) * x - self.s(t) * velocity) / self._turn(t)

    def score(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """grad log p(x(t)) of a velocity, infinite at t = 1."""
        return -self.noise(x, velocity, t) / self.spread(t)

    def velocity_of_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity of predicted noise, which says nothing at infinite noise."""
        clean = (x - self.spread(t) * noise) / self.s(t)
        return self.s_deriv(t) * clean + self.spread_deriv(t) * noise

    def velocity_of_clean(self, t: Tensor) -> Tensor:
        """By how much the velocity rises with the denoised images, infinite at t = 1."""
        return self._turn(t) / self.spread(t)

    def diffusion_of_noising(self, t: Tensor) -> Tensor:
        """Half of g^2 of the SDE that noises along this path: (s' / s) spread^2 - spread spread'."""
        return self.spread(t) * self._turn(t) / self.s(t)


class Linear(Path):
    """Straight lines from noise to data."""

    name = "linear"

    def s(self, t: Tensor) -> Tensor:
        return t

    def s_deriv(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def spread(self, t: Tensor) -> Tensor:
        return 1 - t

    def spread_deriv(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)


class GVP(Path):
    """A quarter of a circle, which keeps the variance; REPA calls it cosine."""

    name = "gvp"

    def s(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def s_deriv(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (math.pi / 2 * t).cos()

    def spread(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def spread_deriv(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * (math.pi / 2 * t).sin()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return 1 - 2 / math.pi * sigma.atan()


class VP(Path):
    """The variance-preserving SDE (arXiv 2011.13456) backwards, which begins at a finite noise level."""

    name, begins_in_noise = "vp", False

    def s(self, t: Tensor) -> Tensor:
        return vp_alpha(self.sigma(t))

    def s_deriv(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.s(t)

    def spread(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.s(t)

    def spread_deriv(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * self.s(t) / self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return vp_sigma(1 - t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return 1 - vp_time(sigma)

    def interval(self, prediction: str) -> tuple[float, float]:
        return 0.0, 1 - EPSILON

    def _beta(self, t: Tensor) -> Tensor:
        return BETA_MIN + (BETA_MAX - BETA_MIN) * (1 - t)


PATHS: dict[str, Path] = {path.name: path for path in (Linear(), GVP(), VP())}


@dataclass(frozen=True)
class FlowCoordinates(Coordinates):
    """Those of a path, in whose time the solvers of flow matching step."""

    path: Path


def flow_coordinates(path: Path) -> FlowCoordinates:
    """The coordinates of a solver that steps along the path."""
    return FlowCoordinates(path.sigma, path.sigma_deriv, path.sigma_inv, path.s, path.s_deriv, path)
