"""Layers that ADM's U-Net and its encoder share, under guided-diffusion's state-dict names (arXiv 2105.05233)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.attention import Attend, dot_product
from dgfast.nets.blocks import FusedGroupNorm


def normalization(channels: int) -> FusedGroupNorm:
    """32 groups, as in ADM. Widths that 32 does not divide, which ADM cannot build, get 4 channels a group."""
    return FusedGroupNorm(32 if channels % 32 == 0 else channels // 4, channels)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t, in units of 1/1000 of the diffusion: [B] -> [B, channels], cosines first, float32."""
    half = channels // 2
    freqs = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def time_mlp(model_channels: int) -> nn.Sequential:
    """`timestep_embedding` [B, model_channels] -> what the residual blocks read, four times as wide."""
    wide = 4 * model_channels
    return nn.Sequential(nn.Linear(model_channels, wide), nn.SiLU(), nn.Linear(wide, wide))


def zeroed(layer: nn.Conv2d | nn.Conv1d) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding; `down` halves the resolution by mean pooling, `up` repeats."""

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, *,
        dropout: float, scale_shift: bool, down: bool = False, up: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.down, self.up, self.scale_shift = down, up, scale_shift
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = norm(x, silu=True)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.up:
            h, x = (F.interpolate(z, scale_factor=2.0, mode="nearest") for z in (h, x))
        h = conv(h)
        params = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = params.chunk(2, dim=1)
            h = norm(h, scale, shift, silu=True)
        else:
            h = norm(h, channel_bias=params, silu=True)
        return self.skip_connection(x) + conv(dropout(h))


class Downsample(nn.Module):
    """Strided convolution, for nets without `resblock_updown`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution, for nets without `resblock_updown`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels.

    Query, key and value lie head by head in `qkv`; in the `new_order`, all heads' queries come first.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.attend: Attend | None = dot_product
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.attend is None:
            return x
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        weight, bias = self.qkv.weight.squeeze(-1), self.qkv.bias
        # A matrix product over tokens leaves q, k and v contiguous in their channels, as fused attention kernels ask.
        qkv = F.linear(tokens, weight, bias)
        if self.new_order:
            qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            qkv = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        h = self.attend(qkv).transpose(1, 2).flatten(2)
        out = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)  # type: ignore[operator, arg-type]
        return x + out.transpose(1, 2).reshape(b, c, height, width)


def heads_of(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Attention heads of a layer: ADM's channels a head go before its number of heads, unless they are -1.

    Raises:
        ValueError: the channels do not split so.
    """
    heads = num_heads if num_head_channels == -1 else channels // num_head_channels
    if heads < 1 or channels % heads or num_head_channels not in (-1, channels // heads):
        size = f"{num_heads} heads" if num_head_channels == -1 else f"heads of {num_head_channels}"
        raise ValueError(f"{channels} channels do not split into {size}")
    return heads


class Stage(nn.Sequential):
    """A sequence whose residual blocks also take the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # the embedding is the point
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def way_down(
    in_channels: int,
    widths: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    res_block: Callable[..., ResBlock],
    attention: Callable[[int], AttentionBlock],
    resblock_updown: bool,
) -> tuple[nn.ModuleList, list[int]]:
    """The blocks from the image to the lowest resolution, and the channels that each of them puts out.

    Args:
        widths: channels at each resolution, every one half of that before.
        attention_resolutions: down-sampling factors (1, 2, 4, ...) at which attention stands.
        res_block, attention: make a layer: (channels in, channels out, down=False) and (channels).
    """
    blocks, channels = nn.ModuleList([Stage(nn.Conv2d(in_channels, widths[0], 3, padding=1))]), [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers: list[nn.Module] = [res_block(channels[-1], width)]
            if 2**level in attention_resolutions:
                layers.append(attention(width))
            blocks.append(Stage(*layers))
            channels.append(width)
        if level != len(widths) - 1:
            blocks.append(Stage(res_block(width, width, down=True) if resblock_updown else Downsample(width)))
            channels.append(width)
    return blocks, channels
