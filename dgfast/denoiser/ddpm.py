"""DDPM's discrete process, on which ADM and DiT are trained."""

import torch
from torch import Tensor, nn

from dgfast.denoiser.preconditioner import Preconditioner, class_indices
from dgfast.noise_levels import ddpm_levels


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
        self, model: nn.Module, img_resolution: int | tuple[int, int], img_channels: int, label_dim: int,
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

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor, Tensor]:
        c_skip, c_out = (0.0, torch.ones_like(sigma)) if self.predict_xstart else (1.0, -sigma)
        return c_skip, c_out, (sigma**2 + 1).rsqrt(), self.timesteps(sigma)

    def labels(self, class_labels: Tensor | None, batch: int) -> Tensor | None:
        """Class indices [B] of one-hot rows [B, label_dim], see `class_indices`."""
        return class_indices(class_labels, batch, self.label_dim, self.null_class, self.levels.device)

    def with_variance(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Denoised images [B, C, H, W] and v, of the same shape; None from a network that does not learn it."""
        x = x.float()
        sigma = sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        labels = self.labels(class_labels, len(x))
        out = self.raw((c_in * x).to(self.dtype), c_noise.flatten(), labels).float()
        denoised, v = out[:, : self.img_channels], out[:, self.img_channels :]
        return (c_skip * x + c_out * denoised).float(), v if self.learn_sigma else None

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.with_variance(x, sigma, class_labels)[0]
