"""ADM's noisy-image encoder: the classifier of classifier guidance and the trunk and head of DG's discriminator.

Dhariwal and Nichol, arXiv 2105.05233; state-dict names and keywords are those of openai/guided-diffusion and of DG.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.adm_blocks import (
    AttentionBlock,
    ResBlock,
    Stage,
    heads_of,
    normalization,
    time_mlp,
    timestep_embedding,
    way_down,
    zeroed,
)
from dgfast.nets.text_options import numbers

_CLASSIFIER_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 4),
    16: (1, 2),
    8: (1,),
}
_LATENT_CHANNELS = 4
_LATENT_CHANNEL_MULT = {32: (1, 2, 3)}  # DG's code for ImageNet, on latents, has other multipliers than its first

_POOL_WIDTH = 2048  # hidden units of the "spatial" pools


class _MeanPool(nn.Module):
    """The mean over all pixels; `nn.AdaptiveAvgPool2d(1)` would set memory strides, which no exporter can express."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 1, 1]
        return x.mean(dim=(2, 3), keepdim=True)


class AttentionPool2d(nn.Module):
    """CLIP's attention pooling: the mean token attends to all pixels. [B, C, H, W] -> [B, out_channels]."""

    def __init__(self, size: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // num_head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, size * size + 1).div_(math.sqrt(channels)))
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


class EncoderUNetModel(nn.Module):
    """ADM's half U-Net with pooled output; keywords and state-dict names are guided-diffusion's.

    Args:
        image_size: height and width of the input.
        attention_resolutions: down-sampling factors (1, 2, 4, ...) at which attention stands.
        num_head_channels: channels an attention head; -1 for `num_heads` of them instead.
        pool: "attention", "adaptive" (mean pooling), or, of the means of every block, "spatial" and "spatial_v2".
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
        num_heads: int = 1,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes, self.pool = model_channels, num_classes, pool
        emb_channels = model_channels * 4
        self.time_embed = time_mlp(model_channels)
        self.label_emb = nn.Embedding(num_classes, emb_channels) if num_classes else None

        def res_block(cin: int, cout: int, down: bool = False) -> ResBlock:
            return ResBlock(cin, emb_channels, cout, dropout=dropout, scale_shift=use_scale_shift_norm, down=down)

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, heads_of(channels, num_heads, num_head_channels), use_new_attention_order)

        widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, channels = way_down(
            in_channels, widths, num_res_blocks, attention_resolutions, res_block, attention, resblock_updown
        )
        ch = widths[-1]
        self.middle_block = Stage(res_block(ch, ch), attention(ch), res_block(ch, ch))
        self.feature_channels, self.feature_size = ch, image_size // 2 ** (len(widths) - 1)
        head: list[nn.Module]
        if pool == "attention":
            head = [AttentionPool2d(self.feature_size, ch, num_head_channels, out_channels)]
        elif pool == "adaptive":
            head = [_MeanPool(), zeroed(nn.Conv2d(ch, out_channels, 1)), nn.Flatten()]
        elif pool in ("spatial", "spatial_v2"):
            between = [nn.ReLU()] if pool == "spatial" else [normalization(_POOL_WIDTH), nn.SiLU()]
            head = [nn.Linear(sum(channels) + ch, _POOL_WIDTH), *between, nn.Linear(_POOL_WIDTH, out_channels)]
        else:
            raise ValueError(f"pool must be attention, adaptive, spatial or spatial_v2, not {pool!r}")
        self.out = nn.Sequential(*([] if pool.startswith("spatial") else [normalization(ch), nn.SiLU()]), *head)

    def features(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Feature map before pooling, which DG's discriminator reads.

        Args:
            x: noisy images [B, in_channels, R, R] in VP coordinates (variance about 1 at every time).
            timesteps: [B], 0 to 999; fractions are allowed.
            labels: class indices [B], only for a net with `num_classes`; None means class 0, as in DG.
        """
        return self._blocks(x, timesteps, labels)[-1]

    def _blocks(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The output of every block."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(torch.zeros_like(timesteps, dtype=torch.long) if labels is None else labels)
        outputs = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            outputs.append(x)
        return [*outputs, self.middle_block(x, emb)]

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, out_channels]; arguments as for `features`."""
        if self.pool.startswith("spatial"):
            outputs = self._blocks(x, timesteps, labels)
            return self.out(torch.cat([output.mean(dim=(2, 3)) for output in outputs], dim=1))
        return self.out(self.features(x, timesteps, labels))


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str | float | Sequence[float],
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    out_channels: int = 1000,
    in_channels: int = 3,
    condition: bool = False,
) -> EncoderUNetModel:
    """An encoder from the keywords of guided-diffusion's `create_classifier`, with DG's three at the end.

    `classifier_use_fp16` says how the official code would run it and changes nothing here: precision is the
    runtime's choice. `classifier_attention_resolutions` is text there, "32,16,8"; a number or a list of them is taken
    too. `condition` adds DG's table of 1000 labels. Four input channels are latents, whose encoder for
    32 x 32 is narrower than that of images.

    Raises:
        ValueError: an image size for which no channel multipliers are published.
    """
    channel_mult = _CLASSIFIER_CHANNEL_MULT | (_LATENT_CHANNEL_MULT if in_channels == _LATENT_CHANNELS else {})
    if image_size not in channel_mult:
        known = ", ".join(str(size) for size in sorted(channel_mult))
        raise ValueError(f"no published classifier has image_size {image_size}; known sizes: {known}")
    resolutions = numbers(classifier_attention_resolutions, "classifier_attention_resolutions")
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=out_channels,
        num_res_blocks=classifier_depth,
        attention_resolutions=[int(image_size // r) for r in resolutions],
        channel_mult=channel_mult[image_size],
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        num_classes=1000 if condition else 0,
    )
