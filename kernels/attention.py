"""Self-attention of queries, keys and values that lie in one tensor, as the layer before them wrote it.

    y = softmax(q k^T / sqrt(d)) v

The softmax is online (arXiv 1805.02867), tile by tile as in FlashAttention-2 (arXiv 2307.08691): the scores never reach
memory. What is kept for the gradient is y and, of each token, the logarithm of its softmax's denominator.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dgfast.kernels.attention_backward import attention_backward
from dgfast.kernels.launch import on_device_of
from dgfast.kernels.tokens import check, heads_at, heads_of_three, like_tokens, options, strides, tile, token_tile
from dgfast.kernels.tuning import ATTENTION


@triton.jit
def attention_kernel(
    qkv: tl.tensor,  # [3, B, H, N, D], the channels D next to each other
    y: tl.tensor,  # [B, N, H, D]
    lse: tl.tensor,  # [B, H, N] float32: log2 of the sum of exp(scores)
    three_stride: int,
    batch_stride: int,
    head_stride: int,
    token_stride: int,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) / sqrt(D)
    BLOCK_ROWS: tl.constexpr,  # queries
    BLOCK_COLUMNS: tl.constexpr,  # keys
) -> None:
    i_head = tl.program_id(1)
    o_q, o_k, o_v = heads_of_three(i_head, H, three_stride, batch_stride, head_stride)
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_columns = tl.arange(0, BLOCK_COLUMNS)
    b_q = tile(qkv + o_q, o_rows, token_stride, N, D, BLOCK_ROWS)

    b_most = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    b_y = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for i_column in range(0, N, BLOCK_COLUMNS):
        b_k = tile(qkv + o_k, i_column + o_columns, token_stride, N, D, BLOCK_COLUMNS)
        b_v = tile(qkv + o_v, i_column + o_columns, token_stride, N, D, BLOCK_COLUMNS)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if N % BLOCK_COLUMNS != 0:
            b_scores = tl.where((i_column + o_columns < N)[None, :], b_scores, float("-inf"))
        b_more = tl.maximum(b_most, tl.max(b_scores, axis=1) * SCALE)
        b_p = tl.exp2(b_scores * SCALE - b_more[:, None])  # scaled here, in one instruction with the difference
        b_fade = tl.exp2(b_most - b_more)
        b_sum = b_sum * b_fade + tl.sum(b_p, axis=1)
        b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y * b_fade[:, None], input_precision="ieee")
        b_most = b_more

    b_y = b_y / b_sum[:, None]
    o_y = heads_at(i_head, H, N * H * D, D) + token_tile(o_rows, H * D, D)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=(o_rows < N)[:, None])
    tl.store(lse + i_head.to(tl.int64) * N + o_rows, b_most + tl.log2(b_sum), mask=o_rows < N)


@triton_op("dgfast::attention", mutates_args=())
def attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, N, D], whose memory is [B, N, H, D], in the type of qkv, and log2(sum(exp(scores))) [B, H, N], float32.

    Args:
        qkv: queries, keys and values [3, B, H, N, D] in any order without gaps, D contiguous; see `tokens.check`.
    """
    check(qkv)
    _, batch, heads, tokens, _ = qkv.shape
    y = like_tokens(qkv)
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    fixed = options(qkv.shape, ATTENTION)
    grid = (triton.cdiv(tokens, fixed["BLOCK_ROWS"]), batch * heads)
    with on_device_of(qkv):
        wrap_triton(attention_kernel)[grid](qkv, y, lse, *strides(qkv), **fixed)
    return y, lse


@attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    return like_tokens(qkv), qkv.new_empty(qkv.shape[1:4], dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _input_gradient(ctx: Any, grad: Tensor, _: object) -> Tensor:
    return attention_backward(grad, *ctx.saved_tensors)


attention.register_autograd(_input_gradient, setup_context=_remember)
