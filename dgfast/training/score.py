"""The denoising loss of EDM (arXiv 2206.00364, section 5, equation 8 and table 1)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.denoiser import EDMPrecond
from dgfast.errors import UserError
from dgfast.training.data import ImageSet

P_MEAN, P_STD = -1.2, 1.2


def deviation(data: ImageSet) -> float:
    """sigma_data: the standard deviation of all values, to two decimals.

    Raises:
        UserError: it is 0 then.
    """
    value = round(float(data.tensors()[0].std(correction=0)), 2)
    if not value:
        raise UserError("--data: all pixels of all images are the same; there is nothing to learn")
    return value


def denoising_loss(
    data: ImageSet, device: torch.device, p_mean: float = P_MEAN, p_std: float = P_STD
) -> Callable[[nn.Module, int], Tensor]:
    """Loss of an `EDMPrecond` on batches of `data`: mean of lambda(sigma) (D(x + n; sigma, y) - x)^2.

    ln sigma is normal, of mean `p_mean` and standard deviation `p_std`.
    """
    images, labels = (tensor.to(device) for tensor in data.tensors())

    def loss(net: nn.Module, batch: int) -> Tensor:
        assert isinstance(net, EDMPrecond)
        picks = torch.randint(len(images), (batch,)).to(device)
        x = images[picks]
        classes = F.one_hot(labels[picks], net.label_dim).float() if net.label_dim else None
        sigma = (p_mean + p_std * torch.randn(batch, 1, 1, 1)).exp().to(device)
        noisy = x + sigma * torch.randn(x.shape).to(device)
        weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
        return (weight * (net(noisy, sigma.flatten(), classes) - x) ** 2).mean()

    return loss
