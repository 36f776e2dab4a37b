"""Layers that the EDM U-Nets share, under EDM's state-dict names (Karras et al., arXiv 2206.00364, table 7)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import ops
from dgfast.nets.attention import Attend, dot_product


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` and what stands around it in a residual block, as one operation (`ops.group_norm_silu`)."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        channel_bias: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        return ops.group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, channel_bias, silu
        )


class GroupNorm(FusedGroupNorm):
    """Group normalisation with 4 channels a group at least and 32 groups at most, as in EDM."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(min(32, channels // 4), channels, eps=eps)


Init = tuple[str, float]
"""How to draw a layer's weights: the rule's name and a gain."""

KAIMING: Init = ("kaiming_uniform", math.sqrt(1 / 3))


class Linear(nn.Linear):
    """`nn.Linear` with EDM's initialisation."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, init: Init) -> None:
        super().__init__(in_features, out_features, bias=bias)
        initialise_(self, init, fan_in=in_features, fan_out=out_features)


def initialise_(layer: nn.Module, init: Init, *, fan_in: int, fan_out: int) -> None:
    """Fill `layer.weight` in place by the named rule and its bias with zeros (EDM, appendix F.3)."""
    weight, bias = layer.weight, layer.bias
    rule, gain = init
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if rule == "xavier_uniform":
            weight.uniform_(-1, 1).mul_(gain * math.sqrt(6 / (fan_in + fan_out)))
        elif rule == "kaiming_uniform":
            weight.uniform_(-1, 1).mul_(gain * math.sqrt(3 / fan_in))
        elif rule == "kaiming_normal":
            weight.normal_().mul_(gain * math.sqrt(1 / fan_in))
        else:
            raise ValueError(f"unknown initialisation {rule!r}")
        if isinstance(bias, Tensor):
            bias.zero_()


class Conv2d(nn.Module):
    """Convolution, optionally with a fixed low-pass filter that halves or doubles the resolution.

    `kernel` 0 is the resampling alone. With `fused_resample` the filter is applied after the convolution when
    down-sampling, at one padding for both. The 2x2 box filter, `(1, 1)`, runs as mean pooling or nearest-neighbour
    repetition, which is the same map.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int] = (1, 1),
        fused_resample: bool = False,
        init: Init = ("kaiming_normal", 1.0),
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.is_box = tuple(resample_filter) == (1, 1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        if kernel:
            area = kernel * kernel
            initialise_(self, init, fan_in=in_channels * area, fan_out=out_channels * area)
        taps = np.array(resample_filter, np.float32)
        taps = np.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer("resample_filter", torch.tensor(taps)[None, None] if up or down else None)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, out_channels, H', W']
        w_pad = self.weight.shape[-1] // 2 if self.weight is not None else 0
        if self.fused_resample and self.down and self.weight is not None and self.resample_filter is not None:
            x = F.conv2d(x, self.weight, padding=w_pad + (self.resample_filter.shape[-1] - 1) // 2)
            x = self._low_pass(x, padding=0)
            return x if self.bias is None else x + self.bias[:, None, None]
        if self.up:
            x = self._upsample(x)
        if self.down:
            x = F.avg_pool2d(x, 2) if self.is_box else self._low_pass(x)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=w_pad)

    def _low_pass(self, x: Tensor, padding: int | None = None) -> Tensor:
        assert self.resample_filter is not None
        pad = (self.resample_filter.shape[-1] - 1) // 2 if padding is None else padding
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=pad)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert self.resample_filter is not None
        pad = (self.resample_filter.shape[-1] - 1) // 2
        taps = self.resample_filter.to(x.dtype).mul(4).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, taps, groups=x.shape[1], stride=2, padding=pad)


class PositionalEmbedding(nn.Module):
    """Sinusoids of geometrically spaced frequencies (DDPM++ and ADM). `endpoint`: the last one is 1/10000 exactly."""

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, x: Tensor) -> Tensor:  # [B] -> [B, channels], cosines first
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        angle = x.float()[:, None] * (1 / 10000) ** exponent
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Sinusoids of random frequencies (NCSN++)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2).mul_(scale))

    def forward(self, x: Tensor) -> Tensor:  # [B] -> [B, channels], cosines first
        angle = x.float()[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def drop_labels(class_labels: Tensor, probability: float) -> Tensor:
    """Rows of class_labels [B, label_dim], each zeroed with this probability, for classifier-free guidance."""
    if not probability:
        return class_labels
    return class_labels * (torch.rand(len(class_labels), 1, device=class_labels.device) >= probability)


class UNetBlock(nn.Module):
    """Residual block with noise-level embedding and optional self-attention (EDM, figure 9).

    `adaptive_scale` puts the embedding in as scale and shift after the second normalisation (ADM); otherwise it is
    added before it (DDPM++, NCSN++).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[int] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = KAIMING,
        init_last: Init = ("kaiming_uniform", 0.0),
        init_attn: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        self.attend: Attend | None = dot_product if self.num_heads else None
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        def resampling(kernel: int) -> Conv2d:
            return Conv2d(
                in_channels, out_channels, kernel, up=up, down=down, resample_filter=resample_filter, init=init
            )

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = resampling(3)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init_last)
        self.skip = None
        if out_channels != in_channels or up or down:
            self.skip = resampling(1 if resample_proj or out_channels != in_channels else 0)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, 1, init=init_last)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # [B, in, H, W], [B, emb] -> [B, out, H', W']
        h = self.conv0(self.norm0(x, silu=True))
        params = self.affine(emb)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = self.norm1(h, scale, shift, silu=True)
        else:
            h = self.norm1(h, channel_bias=params, silu=True)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.attend is None:
            return x * self.skip_scale if self.num_heads else x
        return (self.proj(self._attended(self.norm2(x), self.attend)) + x) * self.skip_scale

    def _attended(self, x: Tensor, attend: Attend) -> Tensor:
        b, c, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        # EDM interleaves query, key and value channel by channel inside each head. Turning the weights instead of the
        # result leaves each of the three contiguous in its channels, which the fused attention kernels ask for.
        weight, bias = (_deinterleaved(parameter, self.num_heads) for parameter in (self.qkv.weight, self.qkv.bias))
        qkv = F.linear(tokens, weight.flatten(1), bias).unflatten(-1, (3, self.num_heads, -1))
        return attend(qkv.permute(2, 0, 3, 1, 4)).permute(0, 1, 3, 2).reshape(b, c, height, width)


def _deinterleaved(parameter: Tensor | None, heads: int) -> Tensor:
    """Rows ordered (head, channel, q | k | v) brought into the order (q | k | v, head, channel)."""
    assert parameter is not None
    return parameter.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
