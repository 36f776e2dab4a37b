"""Preconditioning: a raw network F becomes the denoiser D(x; sigma) (EDM, arXiv 2206.00364, section 5 and table 1).

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

Every denoiser here takes clean-image coordinates plus noise of standard deviation sigma (pixels in about [-1, 1]),
computes its coefficients in float32, runs F in the dtype of F's weights and returns float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dgfast.noise_levels import ddpm_levels, iddpm_levels


class Preconditioner(nn.Module, ABC):
    """What the preconditioners share; `model` is the raw network, under EDM's state-dict name.

    Attributes:
        sigma_min, sigma_max: noise levels for which the network was trained.
        img_resolution, img_channels, label_dim: shape of its images and number of its classes (0: none).
    """

    sigma_min: float
    sigma_max: float

    def __init__(self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int) -> None:
        super().__init__()
        self.model = model
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float, Tensor]:
        """c_skip, c_out, c_in, c_noise for sigma [B, 1, 1, 1]."""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network knows: sigma itself, but for discrete-time networks."""
        return sigma

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Denoised images.

        Args:
            x: noisy images [B, C, H, W].
            sigma: standard deviation of their noise, [B] or a scalar tensor.
            class_labels: one row a sample, [B, label_dim]; a row of zeros, or None, is the unknown class.
            augment_labels: EDM's augmentation parameters [B, augment_dim]; None means no augmentation.
        """
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        dtype = next(self.model.parameters()).dtype
        out = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels, augment_labels)
        return c_skip * x + c_out * out[:, : self.img_channels].float()


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


class DDPMPrecond(Preconditioner):
    """DDPM's discrete process (arXiv 2006.11239) as ADM and DiT are trained on it, with or without learned variance.

    The raw network is called with unit-variance images, timesteps [B] and class indices [B] or None. A network with a
    row for the unknown class says which in its attribute `null_class`; without one, there is no unknown class.

    Args:
        noise_schedule: "linear" or "cosine". steps: number T of timesteps, of which the network saw no others.
        learn_sigma: the network has a second set of output channels, v: where the logarithm of the ancestral step's
            variance lies, from -1 for the least to 1 for the most (arXiv 2102.09672, equation 15).
        predict_xstart: the network gives clean images rather than noise.
        rescale_timesteps: it counts time from 0 to 1000, whatever T is.
    """

    levels: Tensor

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        noise_schedule: str = "linear", steps: int = 1000, learn_sigma: bool = True, predict_xstart: bool = False,
        rescale_timesteps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim)
        self.noise_schedule, self.learn_sigma, self.predict_xstart = noise_schedule, learn_sigma, predict_xstart
        self.null_class: int | None = getattr(model, "null_class", None)
        self._timestep = 1000 / steps if rescale_timesteps else 1.0
        self.register_buffer("levels", ddpm_levels(noise_schedule, steps), persistent=False)
        self.sigma_min, self.sigma_max = float(self.levels[0]), float(self.levels[-1])

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma.double().unsqueeze(-1) - self.levels).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.levels[self._nearest(sigma)].to(sigma.dtype)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """The timesteps, of sigma's shape, that the network reads at the nearest noise levels it knows; float64."""
        return self._nearest(sigma) * self._timestep

    def time(self, sigma: Tensor) -> Tensor:
        """The same in units of 999, as a noise-aware network reads it that was trained beside this one."""
        return self.timesteps(sigma) / 999

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        c_skip, c_out = (0.0, torch.ones_like(sigma)) if self.predict_xstart else (1.0, -sigma)
        return c_skip, c_out, (sigma**2 + 1).rsqrt(), self.timesteps(sigma)

    def labels(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        """Class indices [B] of one-hot rows [B, label_dim]; the unknown class for a row of zeros, or for None.

        Raises:
            ValueError: no labels for a network that knows no unknown class.
        """
        if self.label_dim == 0:
            return None
        if class_labels is None:
            if self.null_class is None:
                raise ValueError("this network has no unknown class: it needs class labels")
            return torch.full((batch,), self.null_class, device=self.levels.device)
        indices = class_labels.argmax(dim=1)
        if self.null_class is None:
            return indices
        return torch.where(class_labels.any(dim=1), indices, self.null_class)

    def with_variance(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Denoised images [B, C, H, W] and v, of the same shape; None from a network that does not learn it."""
        x = x.float()
        sigma = sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        dtype = next(self.model.parameters()).dtype
        labels = self.labels(class_labels, len(x))
        out = self.model((c_in * x).to(dtype), c_noise.flatten(), labels).float()
        denoised, v = out[:, : self.img_channels], out[:, self.img_channels :]
        return (c_skip * x + c_out * denoised).float(), v if self.learn_sigma else None

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.with_variance(x, sigma, class_labels)[0]


PRECONDITIONERS: dict[str, Callable[..., Preconditioner]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
    "DDPMPrecond": DDPMPrecond,
}
