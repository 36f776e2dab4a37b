"""DDPM++ and NCSN++ as EDM parameterises them (Song et al., arXiv 2011.13456; EDM, arXiv 2206.00364, table 7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.blocks import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock, drop_labels


class SongUNet(nn.Module):
    """The raw network F of `EDMPrecond(SongUNet)` and its siblings; keywords and state-dict names are EDM's.

    Args:
        img_resolution: height and width of the images.
        in_channels, out_channels: colour channels in and out.
        label_dim: number of classes, 0 for an unconditional net.
        augment_dim: width of the augmentation label, 0 for none.
        label_dropout: probability of blanking a label during training, for classifier-free guidance.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip".
        decoder_type: "standard" or "skip".
        resample_filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        _require("embedding_type", embedding_type, ("positional", "fourier"))
        _require("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _require("decoder_type", decoder_type, ("standard", "skip"))
        self.label_dropout = label_dropout
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        layers = _Layers(emb_channels, dropout, resample_filter, encoder_type, decoder_type)
        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels, init=_INIT) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=_INIT) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=_INIT)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=_INIT)

        levels = [
            _Level(img_resolution >> level, model_channels * mult, (img_resolution >> level) in attn_resolutions)
            for level, mult in enumerate(channel_mult)
        ]
        self.enc, skips = layers.encoder(in_channels, model_channels, levels, num_blocks)
        self.dec = layers.decoder(skips, out_channels, levels, num_blocks + 1)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, in_channels, R, R], noise_labels [B], class_labels [B, label_dim] -> [B, out_channels, R, R]."""
        emb = self._embed(noise_labels, class_labels, augment_labels, x.dtype)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        out: Tensor | None = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                aux = F.silu(layer(x))
            elif "aux_conv" in name:
                out = layer(aux) if out is None else out + layer(aux)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != layer.in_channels else x, emb)
        assert out is not None
        return out

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1).to(dtype)  # EDM's nets were trained with sines first
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels.to(dtype), self.label_dropout if self.training else 0.0)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


_INIT = ("xavier_uniform", 1.0)


@dataclass(frozen=True)
class _Level:
    """Layers of one resolution, whose blocks put out so many channels."""

    resolution: int
    channels: int
    attention: bool

    @property
    def name(self) -> str:
        return f"{self.resolution}x{self.resolution}"


@dataclass(frozen=True)
class _Layers:
    """The way down and the way up, by EDM's names; the weights are drawn in the order in which the layers stand."""

    emb_channels: int
    dropout: float
    resample_filter: Sequence[int]
    encoder_type: str
    decoder_type: str

    def block(self, cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False) -> UNetBlock:
        return UNetBlock(
            cin, cout, self.emb_channels, up=up, down=down, attention=attention, num_heads=1, dropout=self.dropout,
            skip_scale=math.sqrt(0.5), eps=1e-6, resample_filter=self.resample_filter, resample_proj=True,
            adaptive_scale=False, init=_INIT, init_last=("xavier_uniform", 1e-5),
            init_attn=("xavier_uniform", math.sqrt(0.2)),
        )  # fmt: skip

    def encoder(
        self, in_channels: int, first: int, levels: Sequence[_Level], blocks: int
    ) -> tuple[nn.ModuleDict, list[int]]:
        """The layers, and how many channels each hands over to the decoder."""
        layers, skips = nn.ModuleDict(), [first]
        layers[f"{levels[0].name}_conv"] = Conv2d(in_channels, first, 3, init=_INIT)
        auxiliary = in_channels
        for number, level in enumerate(levels):
            if number:
                auxiliary = self._down(layers, level.name, skips[-1], auxiliary)
                skips.append(skips[-1])
            for index in range(blocks):
                layers[f"{level.name}_block{index}"] = self.block(skips[-1], level.channels, attention=level.attention)
                skips.append(level.channels)
        return layers, skips

    def _down(self, layers: nn.ModuleDict, name: str, channels: int, auxiliary: int) -> int:
        """Half the resolution; how many channels what goes beside the blocks has then."""
        layers[f"{name}_down"] = self.block(channels, channels, down=True)
        if self.encoder_type == "skip":
            halved = Conv2d(auxiliary, auxiliary, 0, down=True, resample_filter=self.resample_filter)
            layers[f"{name}_aux_down"] = halved
            layers[f"{name}_aux_skip"] = Conv2d(auxiliary, channels, 1, init=_INIT)
        if self.encoder_type != "residual":
            return auxiliary
        layers[f"{name}_aux_residual"] = Conv2d(
            auxiliary, channels, 3, down=True, fused_resample=True, resample_filter=self.resample_filter, init=_INIT
        )
        return channels

    def decoder(
        self, skips: Sequence[int], out_channels: int, levels: Sequence[_Level], blocks: int
    ) -> nn.ModuleDict:  # fmt: skip
        layers, waiting, channels = nn.ModuleDict(), list(skips), skips[-1]
        for number, level in reversed(list(enumerate(levels))):
            deepest = number == len(levels) - 1
            if deepest:
                layers[f"{level.name}_in0"] = self.block(channels, channels, attention=True)
                layers[f"{level.name}_in1"] = self.block(channels, channels)
            else:
                layers[f"{level.name}_up"] = self.block(channels, channels, up=True)
            for index in range(blocks):
                attention = index == blocks - 1 and level.attention
                block = self.block(channels + waiting.pop(), level.channels, attention=attention)
                layers[f"{level.name}_block{index}"], channels = block, level.channels
            if self.decoder_type == "skip" or number == 0:
                if not deepest and self.decoder_type == "skip":
                    doubled = Conv2d(out_channels, out_channels, 0, up=True, resample_filter=self.resample_filter)
                    layers[f"{level.name}_aux_up"] = doubled
                layers[f"{level.name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                layers[f"{level.name}_aux_conv"] = Conv2d(channels, out_channels, 3, init=("xavier_uniform", 1e-5))
        return layers


def _require(keyword: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{keyword} must be one of {', '.join(allowed)}, not {value!r}")
