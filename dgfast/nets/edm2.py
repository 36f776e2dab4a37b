"""EDM2's magnitude-preserving U-Net (Karras et al., arXiv 2312.02696, configuration G, figure 21)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.magnitude import SILU_GAIN, Fourier, Layer, concatenated, mix, normalise
from dgfast.nets.attention import Attend, dot_product


class EDM2Block(nn.Module):
    """Residual block, with self-attention behind it, in an encoder's or a decoder's order; keywords are EDM2's.

    The constants of its two sums and of SiLU lie in the weights of the branches that they scale.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: str = "enc",
        resample_mode: str = "keep",
        resample_filter: Sequence[int] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        self.flavor, self.resample_mode, self.dropout, self.clip_act = flavor, resample_mode, dropout, clip_act
        self.is_box = len(resample_filter) == 2 and resample_filter[0] == resample_filter[1]
        taps = np.array(resample_filter, np.float32)
        taps = np.outer(taps / taps.sum(), taps / taps.sum())
        self.register_buffer("resample_filter", torch.tensor(taps)[None, None], persistent=False)
        self.heads = out_channels // channels_per_head if attention else 0
        if self.heads and out_channels % self.heads:
            raise ValueError(f"{out_channels} channels cannot be shared among {self.heads} heads")
        self.attend: Attend | None = dot_product if self.heads else None
        self.keep, branch = mix(res_balance)
        self.keep_attn, branch_attn = mix(attn_balance)

        self.emb_gain: nn.Parameter | None = nn.Parameter(torch.zeros([]))
        inner = out_channels if flavor == "enc" else in_channels
        self.conv_res0 = Layer(inner, out_channels, [3, 3], SILU_GAIN)
        self.emb_linear = Layer(emb_channels, out_channels, [], SILU_GAIN, float32=True)
        self.conv_res1 = Layer(out_channels, out_channels, [3, 3], SILU_GAIN * branch)
        self.conv_skip = Layer(in_channels, out_channels, [1, 1]) if in_channels != out_channels else None
        self.attn_qkv = Layer(out_channels, out_channels * 3, [1, 1]) if self.heads else None
        self.attn_proj = Layer(out_channels, out_channels, [1, 1], branch_attn) if self.heads else None

    def fold(self) -> None:
        """Put gain and normalisation into the weights; the block's gain is gone then."""
        self.emb_linear.fold(self.emb_gain)
        self.emb_gain = None
        for layer in (self.conv_res0, self.conv_res1, self.conv_skip, self.attn_proj):
            if layer is not None:
                layer.fold()
        if self.attn_qkv is not None and not self.attn_qkv.folded:
            self.attn_qkv.fold()
            self.attn_qkv.weight.data = _deinterleaved(self.attn_qkv.weight.data, self.heads)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in, H, W] and silu(embedding) [B, emb], float32 -> [B, out, H', W']."""
        x = self._resampled(x)
        if self.flavor == "enc":
            x = normalise(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(F.silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = F.silu(y * scale.to(y.dtype)[:, :, None, None])
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = self.keep * x + y
        if self.heads:
            branch = 0 if self.attend is None else self._attended(x, self.attend)
            x = self.keep_attn * x + branch
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _resampled(self, x: Tensor) -> Tensor:
        """Depthwise, by two; the box filter, (1, 1), is mean pooling or nearest-neighbour repetition."""
        if self.resample_mode == "keep":
            return x
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        padding = (taps.shape[-1] - 1) // 2
        if self.resample_mode == "down":
            if self.is_box:
                return F.avg_pool2d(x, 2)
            return F.conv2d(x, taps, groups=x.shape[1], stride=2, padding=padding)
        if self.is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv_transpose2d(x, taps * 4, groups=x.shape[1], stride=2, padding=padding)

    def _attended(self, x: Tensor, attend: Attend) -> Tensor:
        """Self-attention of queries, keys and values that are normalised over the channels of each head."""
        assert self.attn_qkv is not None and self.attn_proj is not None
        weight: Tensor = self.attn_qkv.weight
        if not self.attn_qkv.folded:
            weight = _deinterleaved(self.attn_qkv.effective_weight(), self.heads)
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        qkv = F.linear(tokens, weight.flatten(1).to(x.dtype)).unflatten(-1, (3, self.heads, -1))
        y = attend(normalise(qkv, -1).permute(2, 0, 3, 1, 4)).permute(0, 1, 3, 2).reshape(x.shape)
        return self.attn_proj(y)


def _deinterleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows ordered (head, channel, q | k | v), as EDM2 has them, brought into the order (q | k | v, head, channel)."""
    return weight.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)


class EDM2UNet(nn.Module):
    """The raw network of EDM2's preconditioner; keywords and state-dict names are those of EDM2's `UNet`.

    Trained weights are not of unit magnitude by themselves: each use normalises them, until `fold` does it once.

    Args:
        img_resolution, img_channels: of the images, which it gets a plane of ones beside.
        label_dim: number of classes; 0: unconditional.
        model_channels, channel_mult: channels of each resolution, highest first.
        channel_mult_noise, channel_mult_emb: channels of the noise level's cosines and of the embedding, in
            `model_channels`; None: as at the first resolution, and as at the widest.
        num_blocks: residual blocks of each resolution. attn_resolutions: those with attention after each block.
        label_balance, concat_balance: share of the label in the embedding, and of the encoder's output in the decoder.
        resample_filter, channels_per_head, dropout, res_balance, attn_balance, clip_act: see `EDM2Block`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[int] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        channels = [model_channels * mult for mult in channel_mult]
        noise_channels = channels[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(channels) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.concat_balance = concat_balance

        def block(cin: int, cout: int, flavor: str, resample_mode: str = "keep", attention: bool = False) -> EDM2Block:
            return EDM2Block(
                cin, cout, emb_channels, flavor=flavor, resample_mode=resample_mode, resample_filter=resample_filter,
                attention=attention, channels_per_head=channels_per_head, dropout=dropout, res_balance=res_balance,
                attn_balance=attn_balance, clip_act=clip_act,
            )  # fmt: skip

        self.out_gain: nn.Parameter | None = nn.Parameter(torch.zeros([]))
        self.emb_fourier = Fourier(noise_channels)
        of_noise, of_label = mix(label_balance) if label_dim else (1.0, 0.0)
        of_label *= math.sqrt(label_dim)  # a one-hot row has this magnitude too little
        self.emb_noise = Layer(noise_channels, emb_channels, [], of_noise, float32=True)
        self.emb_label = Layer(label_dim, emb_channels, [], of_label, float32=True) if label_dim else None

        self.enc = nn.ModuleDict()
        cout, skips = img_channels + 1, list[int]()
        for level, width in enumerate(channels):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"], cout = Layer(cout, width, [3, 3]), width
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, "enc", "down")
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(cout, width, "enc", attention=res in attn_resolutions)
                cout = width
                skips.append(cout)
        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(channels))):
            res = img_resolution >> level
            if level == len(channels) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, "dec", "up")
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), width
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, "dec", attention=res in attn_resolutions)
        self.out_conv = Layer(cout, img_channels, [3, 3])

    def fold(self) -> None:
        """Put all gains and normalisations into the weights; the state dict is no longer EDM2's, which has gains."""
        for module in self.modules():
            if isinstance(module, EDM2Block):
                module.fold()
        self.out_conv.fold(self.out_gain)
        self.out_gain = None
        for layer in (self.emb_noise, self.emb_label, *self.enc.values()):
            if isinstance(layer, Layer):
                layer.fold()

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, img_channels, R, R], noise_labels [B], class_labels [B, label_dim] -> [B, img_channels, R, R]."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None and class_labels is not None:
            emb = emb + self.emb_label(class_labels.float())
        emb = F.silu(emb)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x) if isinstance(layer, Layer) else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = concatenated(x, skips.pop(), self.concat_balance)
            x = layer(x, emb)
        return self.out_conv(x, self.out_gain)
