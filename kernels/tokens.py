"""What both directions of attention share: tiles of tokens, and everything that is fixed about a launch.

Queries, keys and values are one tensor [3, B, H, N, D]. Networks lay them out differently, head by head or all queries
first, so that its strides are arguments.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.tuning import TokenTiles

CHANNELS = (16, 32, 64, 128)
"""Channels a head that the kernels have: powers of two, of which a tile fits in registers."""
_MOST_HEADS = 65535  # of a batch: what the second axis of a grid can count
_MOST_ELEMENTS = 2**31 - 1  # of a sample, whose offsets are of 32 bits
_LEAST_TOKENS = 16  # of a tile, for a matrix product


@triton.jit
def heads_at(i_head: tl.tensor, H: tl.constexpr, batch_stride: int, head_stride: int) -> tl.tensor:
    """Where the tokens of a head begin; heads are counted through the batch."""
    return (i_head // H).to(tl.int64) * batch_stride + (i_head % H).to(tl.int64) * head_stride


@triton.jit
def heads_of_three(
    i_head: tl.tensor, H: tl.constexpr, three_stride: int, batch_stride: int, head_stride: int
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where its queries, its keys and its values begin."""
    o_q = heads_at(i_head, H, batch_stride, head_stride)
    o_k = o_q + three_stride
    return o_q, o_k, o_k + three_stride


@triton.jit
def of_scores(b_gradient: tl.tensor, SCALE: tl.constexpr) -> tl.tensor:
    """A gradient times 1 / sqrt(D), which SCALE is but for the log2(e) of the exponentials to base 2."""
    return b_gradient * (SCALE * 0.6931471805599453)


@triton.jit
def token_tile(o_tokens: tl.tensor, token_stride: int, D: tl.constexpr) -> tl.tensor:
    """Offsets of these tokens' channels [BLOCK, D]."""
    return o_tokens[:, None] * token_stride + tl.arange(0, D)[None, :]


@triton.jit
def tile(
    tokens: tl.tensor, o_tokens: tl.tensor, token_stride: int, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The channels of these tokens [BLOCK, D]; zeros beyond the last of N."""
    o_tile = token_tile(o_tokens, token_stride, D)
    if N % BLOCK == 0:
        b_tile = tl.load(tokens + o_tile)
    else:
        b_tile = tl.load(tokens + o_tile, mask=(o_tokens < N)[:, None], other=0.0)
    return b_tile


def options(shape: torch.Size | tuple[int, ...], by_channels: Mapping[int, TokenTiles]) -> dict[str, Any]:
    """Everything about a launch that is fixed at compile time, for qkv of this shape [3, B, H, N, D]."""
    heads, tokens, channels = shape[2:]
    tiles = by_channels[min(most for most in by_channels if channels <= most)]
    rows, columns = (
        min(block, max(triton.next_power_of_2(tokens), _LEAST_TOKENS)) for block in (tiles.rows, tiles.columns)
    )
    return {
        "H": heads,
        "N": tokens,
        "D": channels,
        "SCALE": math.log2(math.e) / math.sqrt(channels),
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "num_warps": max(tiles.num_warps * rows // tiles.rows, 1),
        "num_stages": tiles.num_stages,
    }


def strides(qkv: Tensor) -> tuple[int, ...]:
    """Strides of the first four dimensions, in elements."""
    return qkv.stride()[:4]


def like_tokens(qkv: Tensor) -> Tensor:
    """Room for [B, H, N, D] that lies token by token, for the layer that reads all heads of a token."""
    _, batch, heads, tokens, channels = qkv.shape
    return qkv.new_empty(batch, tokens, heads, channels).transpose(1, 2)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether matrices of that type are multiplied fast: of 16 bits. Triton's interpreter has float16 alone."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not triton.knobs.runtime.interpret)


def obstacle(qkv: Tensor) -> str | None:
    """What of this tensor the kernels would misread, None if they have it."""
    if qkv.ndim != 5 or len(qkv) != 3 or qkv.dtype == torch.float64:
        return f"qkv must be [3, B, H, N, D] in float32 or half precision, not {tuple(qkv.shape)} in {qkv.dtype}"
    _, batch, heads, tokens, channels = qkv.shape
    if channels not in CHANNELS or qkv.stride(4) != 1:
        return f"channels a head must be one of {CHANNELS} and contiguous, not {channels} of stride {qkv.stride(4)}"
    if not _fills_its_memory(qkv):
        return f"qkv must have no gaps or overlaps, which its gradient cannot have, not strides {qkv.stride()}"
    if batch * heads > _MOST_HEADS or tokens * qkv.stride(3) > _MOST_ELEMENTS:
        return f"{batch} x {heads} heads of {tokens} tokens are more than the kernels count"
    return None


def _fills_its_memory(x: Tensor) -> bool:
    """Whether x lies as `torch.empty_like(x)` does: each element in a place of its own, with none left free between."""
    count = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != count:
            return x.numel() == 0
        count *= size
    return True


def check(qkv: Tensor) -> None:
    """Refuse with a ValueError what the kernels would misread."""
    reason = obstacle(qkv)
    if reason is not None:
        raise ValueError(reason)
