"""ADM's U-Net, the score network of guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233, section 3).

State-dict names and keywords are those of openai/guided-diffusion: `UNetModel`, and `create_model` of its options.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgfast.nets.adm_blocks import (
    AttentionBlock,
    ResBlock,
    Stage,
    Upsample,
    heads_of,
    normalization,
    time_mlp,
    timestep_embedding,
    way_down,
    zeroed,
)
from dgfast.nets.text_options import numbers

_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}

_COMMON = {
    "learn_sigma": True, "class_cond": True, "attention_resolutions": "32,16,8", "num_res_blocks": 2,
    "num_channels": 256, "resblock_updown": True, "use_scale_shift_norm": True,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "adm-64": _COMMON | {
        "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, "dropout": 0.1,
        "use_new_attention_order": True,
    },
    "adm-128": _COMMON | {"image_size": 128, "num_heads": 4},
    "adm-256": _COMMON | {"image_size": 256, "num_head_channels": 64},
    "adm-256-uncond": _COMMON | {"image_size": 256, "num_head_channels": 64, "class_cond": False},
    "adm-512": _COMMON | {"image_size": 512, "num_head_channels": 64},
}  # fmt: skip
"""Keywords of `create_model` of OpenAI's ImageNet checkpoints; "adm-64" has the cosine schedule, the others linear."""


class UNetModel(nn.Module):
    """ADM's U-Net: noise, and where learned its variance, from images at unit scale and a timestep.

    Args:
        image_size: height and width of the images.
        attention_resolutions: down-sampling factors (1, 2, 4, ...) at which attention stands.
        num_classes: rows of the label table, 0 for none.
        num_heads: attention heads; `num_heads_upsample` on the way up, -1 for as many.
        num_head_channels: channels a head, which goes before the number of heads; -1 for that.
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
        num_classes: int = 0,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        emb_channels = model_channels * 4
        self.time_embed = time_mlp(model_channels)
        self.label_emb = nn.Embedding(num_classes, emb_channels) if num_classes else None

        def res_block(cin: int, cout: int, down: bool = False, up: bool = False) -> ResBlock:
            return ResBlock(
                cin, emb_channels, cout, dropout=dropout, scale_shift=use_scale_shift_norm, down=down, up=up
            )

        def attention(channels: int, heads: int = num_heads) -> AttentionBlock:
            return AttentionBlock(channels, heads_of(channels, heads, num_head_channels), use_new_attention_order)

        widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, skips = way_down(
            in_channels, widths, num_res_blocks, attention_resolutions, res_block, attention, resblock_updown
        )
        ch = widths[-1]
        self.middle_block = Stage(res_block(ch, ch), attention(ch), res_block(ch, ch))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers: list[nn.Module] = [res_block(ch + skips.pop(), width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and block == num_res_blocks:
                    layers.append(res_block(ch, ch, up=True) if resblock_updown else Upsample(ch))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), zeroed(nn.Conv2d(ch, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise, and v in further channels: [B, out_channels, R, R].

        Args:
            x: noisy images [B, in_channels, R, R] of about unit variance.
            timesteps: [B], 0 to 999; fractions are allowed.
            labels: class indices [B], for a net with `num_classes` only.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if self.label_emb is not None:
            if labels is None:
                raise ValueError("this network is conditional: it needs class labels")
            emb = emb + self.label_emb(labels)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        norm, _, conv = self.out
        return conv(norm(x, silu=True))


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | float | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str | float | Sequence[float] = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    in_channels: int = 3,
    num_classes: int = 1000,
) -> UNetModel:
    """A U-Net from the keywords of guided-diffusion's `create_model`, with two of our own at the end.

    `use_checkpoint` and `use_fp16` say how the official code would train and run it and change nothing here. Where it
    has text for numbers, "16,8", a number or a list of them is taken too.

    Raises:
        ValueError: no `channel_mult` for a size that has no published one.
    """
    mult = numbers(channel_mult, "channel_mult") or _CHANNEL_MULT.get(image_size)
    if mult is None:
        raise ValueError(f"no published channel_mult for image_size {image_size}; give one, such as 1,2,3,4")
    return UNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=[int(image_size // r) for r in numbers(attention_resolutions, "attention_resolutions")],
        dropout=dropout,
        channel_mult=mult,
        num_classes=num_classes if class_cond else 0,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )
