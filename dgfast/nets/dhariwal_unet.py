"""ADM's U-Net as EDM parameterises it (Dhariwal and Nichol, arXiv 2105.05233; EDM, arXiv 2206.00364, table 7)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.blocks import KAIMING, Conv2d, GroupNorm, Linear, PositionalEmbedding, UNetBlock, drop_labels


class DhariwalUNet(nn.Module):
    """The raw network F of `EDMPrecond(DhariwalUNet)`; keywords and state-dict names are EDM's.

    Args: as `SongUNet`, without its variants. Attention stands at every block of `attn_resolutions`, with 64
    channels a head.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb

        def block(cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False) -> UNetBlock:
            return UNetBlock(cin, cout, emb_channels, up=up, down=down, attention=attention, dropout=dropout)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, init=("kaiming_uniform", 0.0)) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, init=KAIMING)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=KAIMING)
        self.map_label = (
            Linear(label_dim, emb_channels, bias=False, init=("kaiming_normal", math.sqrt(label_dim)))
            if label_dim
            else None
        )

        self.enc = nn.ModuleDict()
        cout, skips = in_channels, []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                cout = model_channels * mult
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, cout, 3, init=KAIMING)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = block(cin, cout, attention=res in attn_resolutions)
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=res in attn_resolutions)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, 3, init=("kaiming_uniform", 0.0))

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, in_channels, R, R], noise_labels [B], class_labels [B, label_dim] -> [B, out_channels, R, R]."""
        emb = self.map_noise(noise_labels).to(x.dtype)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(x.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            labels = drop_labels(class_labels.to(x.dtype), self.label_dropout if self.training else 0.0)
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)

        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            x = layer(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != layer.in_channels else x, emb)
        return self.out_conv(self.out_norm(x, silu=True))
