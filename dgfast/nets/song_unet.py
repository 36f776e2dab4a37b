"""DDPM++ and NCSN++ as EDM parameterises them (Song et al., arXiv 2011.13456; EDM, arXiv 2206.00364, table 7)."""

import math
from collections.abc import Sequence

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
        init = ("xavier_uniform", 1.0)

        def block(cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False) -> UNetBlock:
            return UNetBlock(
                cin, cout, emb_channels, up=up, down=down, attention=attention, num_heads=1, dropout=dropout,
                skip_scale=math.sqrt(0.5), eps=1e-6, resample_filter=resample_filter, resample_proj=True,
                adaptive_scale=False, init=init, init_last=("xavier_uniform", 1e-5),
                init_attn=("xavier_uniform", math.sqrt(0.2)),
            )  # fmt: skip

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels, init=init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)

        self.enc = nn.ModuleDict()
        cout = caux = in_channels
        skips = []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                cout = model_channels
                self.enc[f"{name}_conv"] = Conv2d(in_channels, cout, 3, init=init)
            else:
                self.enc[f"{name}_down"] = block(cout, cout, down=True)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv2d(caux, caux, 0, down=True, resample_filter=resample_filter)
                    self.enc[f"{name}_aux_skip"] = Conv2d(caux, cout, 1, init=init)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        caux, cout, 3, down=True, fused_resample=True, resample_filter=resample_filter, init=init
                    )
                    caux = cout
            skips.append(cout)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{name}_block{i}"] = block(cin, cout, attention=res in attn_resolutions)
                skips.append(cout)

        self.dec = nn.ModuleDict()
        deepest = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            name = f"{res}x{res}"
            if level == deepest:
                self.dec[f"{name}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{name}_in1"] = block(cout, cout)
            else:
                self.dec[f"{name}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{name}_block{i}"] = block(cin, cout, attention=attention)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < deepest:
                    self.dec[f"{name}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, resample_filter=resample_filter
                    )
                self.dec[f"{name}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(cout, out_channels, 3, init=("xavier_uniform", 1e-5))

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


def _require(keyword: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{keyword} must be one of {', '.join(allowed)}, not {value!r}")
