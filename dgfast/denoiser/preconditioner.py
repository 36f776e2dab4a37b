"""What the preconditioners share.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

Every denoiser here takes clean-image coordinates plus noise of standard deviation sigma (pixels in about [-1, 1]),
computes its coefficients in float32, runs F in the dtype of F's weights and returns float32.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Preconditioner(nn.Module, ABC):
    """What the preconditioners share.

    Attributes:
        raw_name: of the raw network among its modules, as the official state dict has it.
        draws_every_step: its authors' sampler draws noise in each step if there is churn at all, and not only in those
            steps that churn; seeds give their images by the same order of draws alone.
        sigma_min, sigma_max: noise levels for which the network was trained.
        img_resolution, img_channels, label_dim: shape of its images, which have one side or height and width, and
            number of its classes (0: none).
    """

    raw_name: ClassVar[str] = "model"
    draws_every_step: ClassVar[bool] = True

    sigma_min: float
    sigma_max: float

    def __init__(
        self, model: nn.Module, img_resolution: int | tuple[int, int], img_channels: int, label_dim: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.add_module(self.raw_name, model)
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float, Tensor]:
        """c_skip, c_out, c_in, c_noise for sigma [B, 1, 1, 1]."""

    @property
    def raw(self) -> nn.Module:
        """The raw network F."""
        return self.get_submodule(self.raw_name)

    @property
    def dtype(self) -> torch.dtype:
        """In which F computes, and reads its images."""
        return next(self.raw.parameters()).dtype

    def fold(self) -> None:
        """Compute what depends on weights alone once and for all; its state dict may have other entries afterwards."""
        return None

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
        out = self.raw((c_in * x).to(self.dtype), c_noise.flatten(), class_labels, augment_labels)
        return c_skip * x + c_out * out[:, : self.img_channels].float()


def class_indices(
    class_labels: Tensor | None, batch: int, label_dim: int, null_class: int | None, device: torch.device
) -> Tensor | None:
    """Class indices [B] of one-hot rows [B, label_dim]; the unknown class for a row of zeros, or for None.

    Raises:
        ValueError: no labels for a network that knows no unknown class.
    """
    if label_dim == 0:
        return None
    if class_labels is None:
        if null_class is None:
            raise ValueError("this network has no unknown class: it needs class labels")
        return torch.full((batch,), null_class, device=device)
    indices = class_labels.argmax(dim=1)
    return indices if null_class is None else torch.where(class_labels.any(dim=1), indices, null_class)
