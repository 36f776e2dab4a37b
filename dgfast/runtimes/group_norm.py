"""Group normalisation for inductor's C++ back end: its own lowering of it is several times slower than it need be.

That back end vectorises over the last dimension in memory. Statistics of a group mix channels with pixels, and an
index that divides the channel by the group's size stops the vectorisation of everything fused with it. Here pixels are
summed for every channel by itself, the channels of a group are averaged on [B, C], and the means are stored once for
each channel: what runs over pixels has one channel index throughout. No library call stands in between, so that a
region is one C++ function: compiling one costs over a second, whatever is in it.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _average(values: Tensor, groups: int) -> Tensor:
    """[B, C] -> [B, 1, C]: each channel gets the mean of its group.

    `as_strided` makes inductor store the [B, C] means, which it would otherwise compute anew for every pixel.
    """
    batch, channels = values.shape
    means = values.unflatten(1, (groups, -1)).mean(2, keepdim=True)
    of_channels = means.expand(batch, groups, channels // groups).reshape(batch, channels).clone()
    return aten.as_strided.default(of_channels, [batch, channels], [channels, 1]).unsqueeze(1)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, *size] -> [B, pixels, C] in float32."""
    return x.flatten(2).transpose(1, 2).float()


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel's group, [B, 1, C]; the variance in a second pass."""
    mean = _average(x.mean(1), groups)
    return mean, (_average(((x - mean) ** 2).mean(1), groups) + eps).rsqrt()


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `aten.native_group_norm` returns: y, and mean and 1 / standard deviation [B, groups]."""
    pixels = _pixels(x)
    mean, rstd = _statistics(pixels, group, eps)
    scale = rstd if weight is None else rstd * weight.float()
    shift = -mean * scale if bias is None else bias.float() - mean * scale
    y = (pixels * scale + shift).to(x.dtype).transpose(1, 2).reshape(x.shape)

    def of_group(statistic: Tensor) -> Tensor:
        return statistic.reshape(N, group, C // group)[:, :, 0].contiguous().to((x if weight is None else weight).dtype)

    return y, of_group(mean), of_group(rstd)


def native_group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    N: int, C: int, HxW: int, group: int, output_mask: list[bool],
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """The input gradient of `aten.native_group_norm`: rstd (dy - mean(dy) - x' mean(dy x')), dy = grad weight."""
    mean, rstd = (s.float().repeat_interleave(C // group, 1).unsqueeze(1) for s in (mean, rstd))
    normalised = (_pixels(x) - mean) * rstd
    dy = _pixels(grad) if weight is None else _pixels(grad) * weight.float()
    means = _average(dy.mean(1), group), _average((dy * normalised).mean(1), group)
    dx = rstd * (dy - means[0] - normalised * means[1])
    return dx.to(x.dtype).transpose(1, 2).reshape(x.shape), None, None


DECOMPOSITIONS: dict[Any, Any] = {
    aten.native_group_norm.default: native_group_norm,
    aten.native_group_norm_backward.default: native_group_norm_backward,
}
