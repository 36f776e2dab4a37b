"""Operations that keep activations at unit magnitude, of which EDM2's networks are made (arXiv 2312.02696, appendix B).

A weight is normalised wherever it is used, and a gain comes on top. Both are constant once training is over: `fold`
puts them into the weights, after which a layer is a plain convolution or matrix product.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-4
"""Added to a root mean square itself: on weights of norm 1 it counts several percent, so it is part of the network."""
SILU_GAIN = 1 / 0.596
"""What brings silu(x) of unit normal x back to unit magnitude (equation 81)."""


def normalise(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """x over its root mean square along `dim`, which is taken in float32."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(count) + _EPS).to(x.dtype)


def mix(t: float) -> tuple[float, float]:
    """The weights of a and b in their sum of unit magnitude, a share t of it b's (equation 88)."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def concatenated(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b side by side on the channels, each contributing its share, (1 - t) and t, of unit magnitude (eq. 103)."""
    channels = a.shape[1], b.shape[1]
    whole = math.sqrt(sum(channels))
    of_a, of_b = (whole / math.sqrt(n) * weight for n, weight in zip(channels, mix(t), strict=True))
    return torch.cat([a * of_a, b * of_b], dim=1)


class Fourier(nn.Module):
    """Cosines of random frequencies and phases, both of which the buffers hold in radians (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B] -> [B, channels], float32
        return (x.float()[:, None] * self.freqs + self.phases).cos() * math.sqrt(2)


class Layer(nn.Module):
    """A convolution without bias, or with no kernel a linear layer, whose weight is normalised (equation 47).

    Args:
        kernel: its height and width; () for a linear layer.
        factor: a constant on its output.
        float32: it works in float32 whatever the network's type, as the embedding does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], factor: float = 1.0, float32: bool = False
    ) -> None:
        super().__init__()
        self.factor, self.keeps_float32, self.folded = factor, float32, False
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def effective_weight(self, gain: Tensor | None = None) -> Tensor:
        """gain times the weight at unit magnitude over the root of its fan-in, in float32."""
        weight = self.weight.float()
        dims = tuple(range(1, weight.dim()))
        weight = normalise(weight, dims) * (self.factor / math.sqrt(weight[0].numel()))
        return weight if gain is None else weight * gain.float()

    def fold(self, gain: Tensor | None = None) -> None:
        """Put normalisation, gain and factor into the weight: the gain is no longer asked for."""
        if not self.folded:
            with torch.no_grad():
                self.weight.copy_(self.effective_weight(gain))
            self.folded = True

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        weight = (self.weight if self.folded else self.effective_weight(gain)).to(x.dtype)
        return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
