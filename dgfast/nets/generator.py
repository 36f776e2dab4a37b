"""A compact generator: latents to images in one forward. Our own, in the manner of StyleGAN (arXiv 1812.04948)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.blocks import Conv2d, GroupNorm, Init, Linear

XAVIER: Init = ("xavier_uniform", 1.0)


class Generator(nn.Module):
    """(latents [B, latent_dim], class_labels [B, label_dim] or None) -> images [B, C, R, R] in [-1, 1], float32.

    A two-layer map makes one style of latent and class; the style makes the coarsest feature map and sets scale and
    shift of every normalisation after it. Each normalisation sees one image alone, so no image depends on its batch.

    Args:
        img_resolution: height and width of the images.
        latent_dim: width of the latents. style_dim: width of the style.
        channels: width at each resolution, the coarsest first, each twice as fine as the one before; the last has half
            the images' resolution, and its features become 2 x 2 pixels each.

    Raises:
        ValueError: the resolution cannot be halved so often.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        latent_dim: int = 64,
        style_dim: int = 128,
        channels: Sequence[int] = (64, 48, 24),
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.latent_dim = label_dim, latent_dim
        self.coarsest, rest = divmod(img_resolution, 2 ** len(channels))
        if rest or not self.coarsest:
            raise ValueError(f"{img_resolution} pixels cannot be halved {len(channels)} times, as channels asks")
        self.map_label = Linear(label_dim, latent_dim, bias=False, init=XAVIER) if label_dim else None
        self.map_layer0 = Linear(latent_dim * (2 if label_dim else 1), style_dim, init=XAVIER)
        self.map_layer1 = Linear(style_dim, style_dim, init=XAVIER)
        self.start = Linear(style_dim, channels[0] * self.coarsest**2, init=XAVIER)
        self.blocks = nn.ModuleList(
            StyledLayer(Conv2d(cin, cout, 3, up=level > 0), cout, style_dim)
            for level, (cin, cout) in enumerate(zip((channels[0], *channels), channels, strict=False))
        )
        self.out = Conv2d(channels[-1], 4 * img_channels, 3)

    def forward(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        style = self._style(latents.to(self.start.weight.dtype), class_labels)
        x = self.start(style).unflatten(1, (-1, self.coarsest, self.coarsest))
        for layer in self.blocks:
            x = layer(x, style)
        return F.pixel_shuffle(self.out(x).float(), 2).tanh()

    def _style(self, latents: Tensor, class_labels: Tensor | None) -> Tensor:
        if self.map_label is not None:
            if class_labels is None:
                class_labels = latents.new_zeros(len(latents), self.label_dim)
            labels = self.map_label(class_labels.to(latents.dtype) * math.sqrt(self.label_dim))
            latents = torch.cat([latents, labels], dim=1)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(latents))))


class StyledLayer(nn.Module):
    """A convolution, normalisation with scale and shift from the style, SiLU."""

    def __init__(self, conv: nn.Module, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv, self.norm = conv, GroupNorm(channels)
        self.affine = Linear(style_dim, 2 * channels, init=XAVIER)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # [B, cin, H, W], [B, style_dim] -> [B, channels, H', W']
        scale, shift = self.affine(style).chunk(2, dim=1)
        return self.norm(self.conv(x), scale, shift, silu=True)
