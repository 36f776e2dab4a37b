"""What both directions of group normalisation share: one program's tile, sums over a group, per-channel rows.

One program normalises whole groups of one sample: a tile of pixels by channels. A tile that fits in registers is read
once; a larger one twice, the second time mostly from L2, since one program's share is small. Both memory orders, NHWC
and NCHW, are read along their contiguous axis. All arithmetic is float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.tuning import Limits, group_tile


@triton.jit
def group_sum(b_value: tl.tensor, o_c: tl.tensor, D: tl.constexpr, TILE_C: tl.constexpr) -> tl.tensor:
    """Each channel's value [BLOCK_C] becomes the sum over its group; D channels a group need no power of two."""
    if TILE_C == D:
        b_sum = tl.zeros_like(b_value) + tl.sum(b_value, axis=0)
    else:
        m_same = (o_c // D)[:, None] == (o_c // D)[None, :]
        b_sum = tl.sum(tl.where(m_same, b_value[None, :], 0.0), axis=1)
    return b_sum


@triton.jit
def channel_row(values: tl.tensor, o_row: tl.tensor, i_c: tl.tensor, m_c: tl.tensor) -> tl.tensor:
    """One row of per-channel values [BLOCK_C], float32; zeros for None."""
    if values is None:
        b_row = tl.zeros_like(i_c).to(tl.float32)
    else:
        b_row = tl.load(values + o_row + i_c, mask=m_c, other=0.0).to(tl.float32)
    return b_row


def options(
    shape: torch.Size | tuple[int, ...],
    num_groups: int,
    itemsize: int,
    channels_last: bool,
    silu: bool,
    limits: Limits,
) -> dict[str, Any]:
    """Everything about a launch that is fixed at compile time, for x of this shape."""
    channels, pixels = shape[1], shape[2] * shape[3]
    tile = group_tile(channels, num_groups, pixels, itemsize, limits)
    return {
        "SILU": silu,
        "C": channels,
        "D": channels // num_groups,
        "HW": pixels,
        "STRIDE_C": 1 if channels_last else pixels,
        "STRIDE_P": channels if channels_last else 1,
        "TILE_C": tile.channels,
        "BLOCK_C": tile.block_channels,
        "BLOCK_P": tile.block_pixels,
        "num_warps": tile.num_warps,
    }


def launch_options(x: Tensor, num_groups: int, silu: bool, limits: Limits) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time options for a dense x."""
    fixed = options(x.shape, num_groups, x.element_size(), not x.is_contiguous(), silu, limits)
    return (len(x), triton.cdiv(x.shape[1], fixed["TILE_C"])), fixed


def channel_rows(x: Tensor, *values: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Per-channel values [B, C] with contiguous rows, and their row strides; None stays None, with stride 0."""
    for value in values:
        if value is not None and (value.shape != x.shape[:2] or value.device != x.device):
            raise ValueError(f"per-channel values {tuple(value.shape)} on {value.device} for x {tuple(x.shape)}")
    rows = [value if value is None or value.stride(1) == 1 else value.contiguous() for value in values]
    return rows, [0 if row is None else row.stride(0) for row in rows]


def check(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    """Refuse with a ValueError what the kernels would misread."""
    if x.ndim != 4 or x.dtype == torch.float64:
        raise ValueError(f"x must be [B, C, H, W] in float32 or half precision, not {tuple(x.shape)} in {x.dtype}")
    if x.shape[1] % num_groups or not weight.shape == bias.shape == x.shape[1:2]:
        raise ValueError(f"{num_groups} groups, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} for {x.shape}")
