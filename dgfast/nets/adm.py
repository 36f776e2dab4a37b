"""ADM's noisy-image encoder: the classifier of classifier guidance and the trunk and head of DG's discriminator.

Dhariwal and Nichol, arXiv 2105.05233; state-dict names and keywords are those of openai/guided-diffusion and of DG.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.blocks import FusedGroupNorm

_CLASSIFIER_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 4),
    8: (1,),
}


def normalization(channels: int) -> FusedGroupNorm:
    """32 groups, as in ADM. Widths that 32 does not divide, which ADM cannot build, get 4 channels a group."""
    return FusedGroupNorm(32 if channels % 32 == 0 else channels // 4, channels)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of t, in units of 1/1000 of the diffusion: [B] -> [B, channels], cosines first, float32."""
    half = channels // 2
    freqs = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _zeroed(layer: nn.Conv2d | nn.Conv1d) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding; `down` halves the resolution by mean pooling."""

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, *, dropout: float, scale_shift: bool, down: bool
    ) -> None:
        super().__init__()
        self.down, self.scale_shift = down, scale_shift
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = norm(x, silu=True)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = conv(h)
        params = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = params.chunk(2, dim=1)
            h = norm(h, scale, shift, silu=True)
        else:
            h = norm(h, channel_bias=params, silu=True)
        return self.skip_connection(x) + conv(dropout(h))


class _MeanPool(nn.Module):
    """The mean over all pixels; `nn.AdaptiveAvgPool2d(1)` would set memory strides, which no exporter can express."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 1, 1]
        return x.mean(dim=(2, 3), keepdim=True)


class Downsample(nn.Module):
    """Strided convolution, for nets without `resblock_updown`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels; query, key and value lie head by head in `qkv`, as in ADM's default order."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        weight, bias = self.qkv.weight.squeeze(-1), self.qkv.bias
        # A matrix product over tokens leaves q, k and v contiguous in their channels, as fused attention kernels ask.
        qkv = F.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [B, heads, HW, C / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)  # type: ignore[operator, arg-type]
        return x + out.transpose(1, 2).reshape(b, c, height, width)


class AttentionPool2d(nn.Module):
    """CLIP's attention pooling: the mean token attends to all pixels. [B, C, H, W] -> [B, out_channels]."""

    def __init__(self, size: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // num_head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, size * size + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = x.reshape(b, c, height * width)
        tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], dim=-1)
        tokens = (tokens + self.positional_embedding).transpose(-1, -2)  # [B, 1 + HW, C]
        # Only the mean token's output is used, so only its query is computed: a third of the projection's work less.
        weight, bias = self.qkv_proj.weight.squeeze(-1), self.qkv_proj.bias
        assert bias is not None
        q = F.linear(tokens[:, :1], weight[:c], bias[:c])
        k, v = F.linear(tokens, weight[c:], bias[c:]).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c, 1)
        return self.c_proj(pooled).squeeze(-1)


class _Stage(nn.Sequential):
    """A sequence whose residual blocks also take the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # the embedding is the point
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class EncoderUNetModel(nn.Module):
    """ADM's half U-Net with pooled output; keywords and state-dict names are guided-diffusion's.

    Args:
        image_size: height and width of the input.
        attention_resolutions: down-sampling factors (1, 2, 4, ...) at which attention stands.
        pool: "attention" or "adaptive" (mean pooling).
        num_classes: rows of the label table that DG's conditional discriminator adds to the time embedding; 0: none.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        pool: str = "adaptive",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = nn.Embedding(num_classes, emb_channels) if num_classes else None

        def res_block(cin: int, cout: int, down: bool = False) -> ResBlock:
            return ResBlock(cin, emb_channels, cout, dropout=dropout, scale_shift=use_scale_shift_norm, down=down)

        def attention(channels: int) -> AttentionBlock:
            if channels % num_head_channels:
                raise ValueError(f"{channels} channels do not split into heads of {num_head_channels}")
            return AttentionBlock(channels, channels // num_head_channels)

        ch = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(in_channels, ch, 3, padding=1))])
        factor = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(ch, int(mult * model_channels))]
                ch = int(mult * model_channels)
                if factor in attention_resolutions:
                    layers.append(attention(ch))
                self.input_blocks.append(_Stage(*layers))
            if level != len(channel_mult) - 1:
                self.input_blocks.append(_Stage(res_block(ch, ch, down=True) if resblock_updown else Downsample(ch)))
                factor *= 2
        self.middle_block = _Stage(res_block(ch, ch), attention(ch), res_block(ch, ch))
        self.feature_channels, self.feature_size = ch, image_size // factor
        head: list[nn.Module]
        if pool == "attention":
            head = [AttentionPool2d(self.feature_size, ch, num_head_channels, out_channels)]
        elif pool == "adaptive":
            head = [_MeanPool(), _zeroed(nn.Conv2d(ch, out_channels, 1)), nn.Flatten()]
        else:
            raise ValueError(f"pool must be attention or adaptive, not {pool!r}")
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), *head)

    def features(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Feature map before pooling, which DG's discriminator reads.

        Args:
            x: noisy images [B, in_channels, R, R] in VP coordinates (variance about 1 at every time).
            timesteps: [B], 0 to 999; fractions are allowed.
            labels: class indices [B], only for a net with `num_classes`; None means class 0, as in DG.
        """
        dtype = x.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(torch.zeros_like(timesteps, dtype=torch.long) if labels is None else labels)
        for stage in self.input_blocks:
            x = stage(x, emb)
        return self.middle_block(x, emb)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, out_channels]; arguments as for `features`."""
        return self.out(self.features(x, timesteps, labels))


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    out_channels: int = 1000,
    in_channels: int = 3,
    condition: bool = False,
) -> EncoderUNetModel:
    """An encoder from the keywords of guided-diffusion's `create_classifier`, with DG's three at the end.

    `classifier_use_fp16` says how the official code would run it and changes nothing here: precision is the
    runtime's choice. `condition` adds DG's table of 1000 labels.

    Raises:
        ValueError: an image size for which no channel multipliers are published.
    """
    if image_size not in _CLASSIFIER_CHANNEL_MULT:
        known = ", ".join(str(size) for size in sorted(_CLASSIFIER_CHANNEL_MULT))
        raise ValueError(f"no published classifier has image_size {image_size}; known sizes: {known}")
    resolutions = [int(r) for r in classifier_attention_resolutions.split(",")]
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=out_channels,
        num_res_blocks=classifier_depth,
        attention_resolutions=[image_size // r for r in resolutions],
        channel_mult=_CLASSIFIER_CHANNEL_MULT[image_size],
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        num_classes=1000 if condition else 0,
    )
