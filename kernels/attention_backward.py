"""The input gradient of `attention`, from its input and its result: the scores are computed again, tile by tile.

    p = exp(s - lse),  dv = p^T dy,  ds = p (dy v^T - delta) / sqrt(D),  dq = ds k,  dk = ds^T q

with delta the sum of dy y over a token's channels (FlashAttention-2, arXiv 2307.08691, section 3.1.2). One kernel goes
along a block of queries, one along a block of keys: no two programs write to one place, so that the result is the same
every time, for seven matrix products in place of five. The three gradients lie in one tensor, ordered like qkv: what
reads them is the gradient of one linear layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dgfast.kernels.launch import on_device_of
from dgfast.kernels.tokens import check, heads_at, heads_of_three, of_scores, options, strides, tile, token_tile
from dgfast.kernels.tuning import ATTENTION_BACKWARD


@triton.jit
def attention_backward_queries_kernel(
    grad: tl.tensor,  # [B, N, H, D], gradient of y
    qkv: tl.tensor,  # [3, B, H, N, D], the channels D next to each other
    y: tl.tensor,  # [B, N, H, D]
    lse: tl.tensor,  # [B, H, N] float32: log2 of the sum of exp(scores)
    delta: tl.tensor,  # [B, H, N] float32, which the other kernel reads
    dqkv: tl.tensor,  # ordered like qkv
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
    o_y = heads_at(i_head, H, N * H * D, D)
    b_q = tile(qkv + o_q, o_rows, token_stride, N, D, BLOCK_ROWS)
    b_grad = tile(grad + o_y, o_rows, H * D, N, D, BLOCK_ROWS)
    b_y = tile(y + o_y, o_rows, H * D, N, D, BLOCK_ROWS)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_y.to(tl.float32), axis=1)
    o_row = i_head.to(tl.int64) * N + o_rows
    tl.store(delta + o_row, b_delta, mask=o_rows < N)
    b_lse = tl.load(lse + o_row, mask=o_rows < N, other=0.0)

    b_dq = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for i_column in range(0, N, BLOCK_COLUMNS):
        b_k = tile(qkv + o_k, i_column + o_columns, token_stride, N, D, BLOCK_COLUMNS)
        b_v = tile(qkv + o_v, i_column + o_columns, token_stride, N, D, BLOCK_COLUMNS)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if N % BLOCK_COLUMNS != 0:  # a score of 0 would be infinitely more than scores that all are far below it
            b_scores = tl.where((i_column + o_columns < N)[None, :], b_scores, float("-inf"))
        b_p = tl.exp2(b_scores * SCALE - b_lse[:, None])
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    b_dq = of_scores(b_dq, SCALE).to(dqkv.dtype.element_ty)
    tl.store(dqkv + o_q + token_tile(o_rows, token_stride, D), b_dq, mask=(o_rows < N)[:, None])


@triton.jit
def attention_backward_keys_kernel(
    grad: tl.tensor,  # [B, N, H, D], gradient of y
    qkv: tl.tensor,  # [3, B, H, N, D], the channels D next to each other
    lse: tl.tensor,  # [B, H, N] float32: log2 of the sum of exp(scores)
    delta: tl.tensor,  # [B, H, N] float32
    dqkv: tl.tensor,  # ordered like qkv
    three_stride: int,
    batch_stride: int,
    head_stride: int,
    token_stride: int,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) / sqrt(D)
    BLOCK_ROWS: tl.constexpr,  # keys
    BLOCK_COLUMNS: tl.constexpr,  # queries
) -> None:
    i_head = tl.program_id(1)
    o_q, o_k, o_v = heads_of_three(i_head, H, three_stride, batch_stride, head_stride)
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_columns = tl.arange(0, BLOCK_COLUMNS)
    o_y = heads_at(i_head, H, N * H * D, D)
    b_k = tile(qkv + o_k, o_rows, token_stride, N, D, BLOCK_ROWS)
    b_v = tile(qkv + o_v, o_rows, token_stride, N, D, BLOCK_ROWS)

    b_dk = tl.zeros((BLOCK_ROWS, D), tl.float32)
    b_dv = tl.zeros((BLOCK_ROWS, D), tl.float32)
    for i_column in range(0, N, BLOCK_COLUMNS):
        o_column = i_column + o_columns
        o_lse, m_column = i_head.to(tl.int64) * N + o_column, o_column < N
        b_q = tile(qkv + o_q, o_column, token_stride, N, D, BLOCK_COLUMNS)
        b_grad = tile(grad + o_y, o_column, H * D, N, D, BLOCK_COLUMNS)
        b_lse = tl.load(lse + o_lse, mask=m_column, other=0.0)  # queries beyond the last are 0, as their gradients are
        b_delta = tl.load(delta + o_lse, mask=m_column, other=0.0)
        b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_scores * SCALE - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    b_dk = of_scores(b_dk, SCALE)
    o_tile, m_rows = token_tile(o_rows, token_stride, D), (o_rows < N)[:, None]
    tl.store(dqkv + o_k + o_tile, b_dk.to(dqkv.dtype.element_ty), mask=m_rows)
    tl.store(dqkv + o_v + o_tile, b_dv.to(dqkv.dtype.element_ty), mask=m_rows)


@triton_op("dgfast::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, qkv: Tensor, y: Tensor, lse: Tensor) -> Tensor:
    """Gradient of `attention` for qkv, [3, B, H, N, D] in the type and memory order of qkv.

    Args:
        grad: [B, H, N, D], gradient of y. y, lse: what `attention` returned.
    """
    check(qkv)
    grad, y = (x.transpose(1, 2).contiguous() for x in (grad, y))
    delta, dqkv = torch.empty_like(lse), torch.empty_like(qkv)
    fixed = options(qkv.shape, ATTENTION_BACKWARD)
    grid = (triton.cdiv(qkv.shape[3], fixed["BLOCK_ROWS"]), lse.shape[0] * lse.shape[1])
    with on_device_of(qkv):
        wrap_triton(attention_backward_queries_kernel)[grid](grad, qkv, y, lse, delta, dqkv, *strides(qkv), **fixed)
        wrap_triton(attention_backward_keys_kernel)[grid](grad, qkv, lse, delta, dqkv, *strides(qkv), **fixed)
    return dqkv


@attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv)
