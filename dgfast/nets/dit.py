"""DiT: a transformer over patches of latents, conditioned by adaptive layer normalisation.

Peebles and Xie, arXiv 2212.09748; state-dict names and keywords are those of facebookresearch/DiT.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.nets.adm_blocks import timestep_embedding
from dgfast.nets.attention import Attend, dot_product

_FREQUENCIES = 256  # length of the time's sinusoids
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {"patch_size": patch, "depth": depth, "hidden_size": width, "num_heads": heads}
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
"""Keywords of the published sizes, by their names: DiT-S/8 to DiT-XL/2 (arXiv 2212.09748, table 1)."""


def position_embedding(width: int, grid: int) -> Tensor:
    """Sinusoids of the patches' columns, then of their rows: [1, grid^2, width]; width must be a multiple of 4."""
    quarter = width // 4
    freqs = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * freqs
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, width / 2]
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1)[None].float()


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift for tokens x [B, T, C]; shift and scale [B, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class _PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timesteps, _FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class _LabelEmbedder(nn.Module):
    """The last row of the table is the null class, if classes were dropped in training."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + (dropout > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend: Attend = dot_product
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(qkv).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulation(width: int, parts: int) -> nn.Sequential:
    """Starts at zero, so that every block starts as the identity (adaLN-Zero)."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.skipped = False  # a guidance sets it: the tokens then pass as they are
        self.attn = _Attention(width, num_heads)
        self.mlp = _Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.skipped:
            return x
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(_modulated(x, shift, scale))
        return x + gate_mlp[:, None] * self.mlp(_modulated(x, shift_mlp, scale_mlp))


class _FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = _modulation(width, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(_modulated(x, *self.adaLN_modulation(condition).chunk(2, dim=1)))


class DiT(nn.Module):
    """Predicts the noise in latents, and with `learn_sigma` also how much variance a step adds.

    Args:
        input_size: height and width of the latents; patch_size must divide it.
        class_dropout_prob: 0 leaves the null class out of the label table; nothing is dropped here.

    Raises:
        ValueError: sizes that do not divide each other.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        for what, whole, part in (
            ("input_size", input_size, patch_size),
            ("hidden_size", hidden_size, num_heads),
            ("hidden_size", hidden_size, 4),
        ):
            if whole % part:
                raise ValueError(f"{what} {whole} is not a multiple of {part}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.null_class = num_classes, num_classes if class_dropout_prob > 0 else None
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = _PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = _TimestepEmbedder(hidden_size)
        self.y_embedder = _LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, grid), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = _FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Noise, and what `learn_sigma` adds: [B, out_channels, R, R].

        Args:
            x: noisy latents [B, in_channels, R, R] in VP coordinates (variance about 1 at every time).
            timesteps: [B], 0 to 999; fractions are allowed.
            labels: class indices [B]; `null_class` stands for the unknown class.
        """
        condition = self.t_embedder(timesteps) + self.y_embedder(labels)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._image(self.final_layer(tokens, condition))

    def _image(self, tokens: Tensor) -> Tensor:
        """Patches [B, T, patch^2 channels] put in their places."""
        grid, patch = self.input_size // self.patch_size, self.patch_size
        patches = tokens.reshape(-1, grid, grid, patch, patch, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.input_size, self.input_size)
