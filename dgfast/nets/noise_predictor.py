"""A small U-Net that predicts the noise in images: the score network of Score Mismatching (arXiv 2309.11043)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.blocks import Linear
from dgfast.nets.generator import XAVIER, StyledLayer

GROUP = 4
"""Neighbours in a batch that `minibatch_std` compares."""


class NoisePredictor(nn.Module):
    """(x [B, C, R, R], level [B] int64, class_labels [B, label_dim] or None) -> predicted noise [B, C, R, R].

    Strided convolutions down, transposed ones up, and a skip at each resolution; level and class scale and shift the
    features.

    Args:
        img_resolution: height and width of the images.
        levels: number of noise levels.
        channels: width at each resolution, from half the images' on down.
        minibatch_std: show the coarsest features how much the images of each `GROUP` in the batch differ; where groups
            are of one class, that keeps a generator from making one image of each.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        levels: int = 10,
        channels: Sequence[int] = (16, 32, 64),
        emb_channels: int = 64,
        minibatch_std: bool = False,
    ) -> None:
        super().__init__()
        if img_resolution % 2 ** len(channels):
            raise ValueError(f"{img_resolution} pixels cannot be halved {len(channels)} times, as channels asks")
        self.map_level = nn.Embedding(levels, emb_channels)
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=XAVIER) if label_dim else None
        self.map_layer = Linear(emb_channels, emb_channels, init=XAVIER)
        widths = (img_channels, *channels)
        self.down = nn.ModuleList(
            StyledLayer(nn.Conv2d(cin, cout, 4, stride=2, padding=1), cout, emb_channels)
            for cin, cout in pairwise(widths)
        )
        self.minibatch_std = minibatch_std
        middle = nn.Conv2d(widths[-1] + minibatch_std, widths[-1], 3, padding=1)
        self.middle = StyledLayer(middle, widths[-1], emb_channels)
        self.up = nn.ModuleList(
            StyledLayer(nn.ConvTranspose2d(2 * cin, cout, 4, stride=2, padding=1), cout, emb_channels)
            for cin, cout in zip(widths[:1:-1], widths[-2:0:-1], strict=True)
        )
        self.out = nn.ConvTranspose2d(2 * widths[1], img_channels, 4, stride=2, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = self.map_level(level)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        emb = F.silu(self.map_layer(emb))
        skips = []
        for layer in self.down:
            x = layer(x, emb)
            skips.append(x)
        x = self.middle(_with_std(x) if self.minibatch_std else x, emb)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(torch.cat([x, skips.pop()], dim=1))


def _with_std(x: Tensor) -> Tensor:
    """x with one more channel: the standard deviation over each group, averaged over features (arXiv 1710.10196)."""
    group = GROUP if len(x) % GROUP == 0 else len(x)
    spread = (x.unflatten(0, (-1, group)).var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, spread.repeat_interleave(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], dim=1)
