"""Networks of diffusers: DDPM's discrete process with whatever noise schedule and prediction a scheduler of its has."""

import torch
from torch import Tensor, nn

from dgfast.denoiser.ddpm import DDPMPrecond
from dgfast.noise_levels import levels_of_betas

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class DiffusersPrecond(DDPMPrecond):
    """A network of diffusers under the noise schedule of its scheduler, whose names the keywords have.

    The raw network is called as `DDPMPrecond` calls it.

    Args:
        img_resolution: side of its images; [height, width] where they are not square.
        beta_schedule: "linear" in beta, "scaled_linear" in its root, or "squaredcos_cap_v2", the cosine schedule.
        prediction_type: what the network gives: "epsilon" the noise, "sample" the clean images, "v_prediction" their
            mix alpha noise - sigma image (arXiv 2202.00512), for images alpha image + sigma noise of unit variance.

    Raises:
        ValueError: an unknown schedule or prediction, or betas that are no variances.
    """

    def __init__(
        self, model: nn.Module, img_resolution: int | tuple[int, int], img_channels: int, label_dim: int,
        beta_schedule: str = "linear", beta_start: float = 1e-4, beta_end: float = 0.02,
        num_train_timesteps: int = 1000, prediction_type: str = "epsilon", learn_sigma: bool = False,
    ) -> None:  # fmt: skip
        for name, value, known in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES), ("prediction_type", prediction_type, PREDICTIONS)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} {value!r:.40} is not one of {', '.join(known)}")
        super().__init__(model, img_resolution, img_channels, label_dim, "cosine", num_train_timesteps, learn_sigma)
        self.prediction_type = prediction_type
        if beta_schedule != "squaredcos_cap_v2":
            power = 2 if beta_schedule == "scaled_linear" else 1
            ends = beta_start ** (1 / power), beta_end ** (1 / power)
            line = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64, device="cpu")
            self.levels = levels_of_betas(line**power)
            as_adm = (power, beta_start, beta_end, num_train_timesteps) == (1, 1e-4, 0.02, 1000)
            self.noise_schedule = "linear" if as_adm else beta_schedule + " of its own"
        self.sigma_min, self.sigma_max = float(self.levels[0]), float(self.levels[-1])

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor, Tensor]:
        c_in = (sigma**2 + 1).rsqrt()
        c_noise = self.timesteps(sigma)
        if self.prediction_type == "sample":
            return 0.0, torch.ones_like(sigma), c_in, c_noise
        if self.prediction_type == "v_prediction":
            return c_in**2, -sigma * c_in, c_in, c_noise
        return 1.0, -sigma, c_in, c_noise
