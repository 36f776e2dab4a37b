"""The preconditioner of EDM2's code (Karras et al., arXiv 2312.02696)."""

import torch
from torch import Tensor, nn

from dgfast.denoiser.edm import EDMPrecond
from dgfast.magnitude import Fourier, Layer


class EDM2Precond(EDMPrecond):
    """EDM's coefficients around the raw network `unet`, beside which stands its training's estimate of its own error.

    Args:
        model: the raw network, which has a method `fold`.
        logvar_channels: cosines of the noise level that the estimate is made of.
    """

    raw_name = "unet"
    null_class = None  # trained without a row for no class: classifier-free guidance takes a network of its own
    draws_every_step = False

    def __init__(
        self, model: nn.Module, img_resolution: int, img_channels: int, label_dim: int,
        sigma_data: float = 0.5, logvar_channels: int = 128,
    ) -> None:  # fmt: skip
        super().__init__(model, img_resolution, img_channels, label_dim, sigma_data=sigma_data)
        self.logvar_fourier = Fourier(logvar_channels)
        self.logvar_linear = Layer(logvar_channels, 1, [], float32=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.raw.get_parameter("out_conv.weight").dtype  # the embedding's stay float32

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Logarithm of the network's expected loss at noise levels sigma [B], as training weighs it: [B]."""
        _, _, _, c_noise = self.coefficients(sigma.float())
        return self.logvar_linear(self.logvar_fourier(c_noise.reshape(-1)))[:, 0]

    def fold(self) -> None:
        self.raw.fold()  # type: ignore[operator]
        self.logvar_linear.fold()
