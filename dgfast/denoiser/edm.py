"""The preconditioners of EDM's code (arXiv 2206.00364, section 5 and table 1)."""

import math

import torch
from torch import Tensor, nn

from dgfast.denoiser.preconditioner import Preconditioner
from dgfast.noise_levels import iddpm_levels


class EDMPrecond(Preconditioner):
    """EDM's own choice: unit variance in and out, for data of standard deviation `sigma_data`."""

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        sigma_min: float = 0, sigma_max: float = math.inf, sigma_data: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variance = sigma**2 + self.sigma_data**2
        return (
            self.sigma_data**2 / variance,
            sigma * self.sigma_data * variance.rsqrt(),
            variance.rsqrt(),
            sigma.log() / 4,
        )


class VPPrecond(Preconditioner):
    """Variance-preserving SDE of Song et al. (arXiv 2011.13456): noise prediction at time (M - 1) t(sigma)."""

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        # In float32 and without expm1, as the official code computes its bounds; on the CPU, even if built on meta.
        exponents = (torch.tensor(0.5 * beta_d * t**2 + beta_min * t, device="cpu") for t in (epsilon_t, 1.0))
        low, high = (exponent.exp().sub(1).sqrt() for exponent in exponents)
        self.sigma_min, self.sigma_max = float(low), float(high)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at VP time t."""
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """VP time at which the noise level is sigma."""
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        return 1.0, -sigma, (sigma**2 + 1).rsqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Preconditioner):
    """Variance-exploding SDE of Song et al. (arXiv 2011.13456)."""

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        sigma_min: float = 0.02, sigma_max: float = 100,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, float, Tensor]:
        return 1.0, sigma, 1.0, (0.5 * sigma).log()


class iDDPMPrecond(Preconditioner):  # noqa: N801 - the official name, which bundles and pickles carry
    """Improved DDPM (arXiv 2102.09672): M discrete noise levels `u`, noise prediction, twice the output channels."""

    u: Tensor

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        C_1: float = 0.001, C_2: float = 0.008, M: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        self.M = M
        self.register_buffer("u", iddpm_levels(C_1, C_2, M, torch.float32))
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def _nearest(self, sigma: Tensor) -> Tensor:
        levels = self.u.to(sigma.dtype) if sigma.dtype == torch.float64 else self.u
        return (sigma.to(levels.dtype).unsqueeze(-1) - levels).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u[self._nearest(sigma)].to(sigma.dtype)

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        return 1.0, -sigma, (sigma**2 + 1).rsqrt(), (self.M - 1 - self._nearest(sigma)).to(sigma.dtype)
