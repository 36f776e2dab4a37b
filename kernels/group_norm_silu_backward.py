"""The input gradient of `group_norm_silu`, from its input and its statistics: the activation is recomputed.

With u the gradient of the normalised x: dx = rstd (u - mean(u) - normed mean(u normed)), means over the group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dgfast.kernels.group_norm import channel_row, channel_rows, check, group_sum, launch_options
from dgfast.kernels.launch import dense, on_device_of, ordered_like
from dgfast.kernels.tuning import BACKWARD


@triton.jit
def _normed_gradient(
    b_grad: tl.tensor, b_normed: tl.tensor, b_slope: tl.tensor, b_offset: tl.tensor, SILU: tl.constexpr
) -> tl.tensor:
    """Gradient with respect to GN's output before weight and bias, z = b_normed b_slope + b_offset."""
    if SILU:
        b_z = b_normed * b_slope[None, :] + b_offset[None, :]
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_z))
        b_grad *= b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
    return b_grad * b_slope[None, :]


@triton.jit
def group_norm_silu_backward_kernel(
    grad: tl.tensor,  # [B, C, H, W] in the order of x
    x: tl.tensor,  # [B, C, H, W], dense in either order
    mean: tl.tensor,  # [B, C // D] float32
    rstd: tl.tensor,
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    scale: tl.tensor,  # [B, C] with contiguous rows, or None; so are shift and channel_bias
    shift: tl.tensor,
    channel_bias: tl.tensor,
    dx: tl.tensor,  # [B, C, H, W] in the order of x
    scale_stride: int,
    shift_stride: int,
    channel_bias_stride: int,
    SILU: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,  # channels a group
    HW: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_P: tl.constexpr,
    TILE_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    i_c = tl.program_id(1) * TILE_C + o_c
    m_c = (o_c < TILE_C) & (i_c < C)
    o_x = i_b * (C * HW) + i_c[None, :] * STRIDE_C + o_p[:, None] * STRIDE_P
    m_first = m_c[None, :] & (o_p < HW)[:, None]

    o_g = i_b * (C // D) + i_c // D
    b_rstd = tl.load(rstd + o_g, mask=m_c, other=0.0)
    b_centre = tl.load(mean + o_g, mask=m_c, other=0.0) - channel_row(channel_bias, i_b * channel_bias_stride, i_c, m_c)
    b_factor = channel_row(scale, i_b * scale_stride, i_c, m_c) + 1.0
    b_slope = channel_row(weight, 0, i_c, m_c) * b_factor
    b_offset = channel_row(bias, 0, i_c, m_c) * b_factor + channel_row(shift, i_b * shift_stride, i_c, m_c)

    b_x = tl.load(x + o_x, mask=m_first, other=0.0).to(tl.float32)
    b_grad = tl.load(grad + o_x, mask=m_first, other=0.0).to(tl.float32)
    b_first = (b_x - b_centre[None, :]) * b_rstd[None, :]
    b_first_u = _normed_gradient(b_grad, b_first, b_slope, b_offset, SILU)
    b_sum = b_first_u
    b_dot = b_first_u * b_first
    for i_p in range(1, (HW + BLOCK_P - 1) // BLOCK_P):
        m_x = m_c[None, :] & (i_p * BLOCK_P + o_p < HW)[:, None]
        o_block = o_x + i_p * (BLOCK_P * STRIDE_P)
        b_x = tl.load(x + o_block, mask=m_x, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + o_block, mask=m_x, other=0.0).to(tl.float32)
        b_normed = (b_x - b_centre[None, :]) * b_rstd[None, :]
        b_u = _normed_gradient(b_grad, b_normed, b_slope, b_offset, SILU)
        b_sum += b_u
        b_dot += b_u * b_normed
    b_mean_u = group_sum(tl.sum(b_sum, axis=0), o_c, D, TILE_C) / (D * HW)
    b_mean_dot = group_sum(tl.sum(b_dot, axis=0), o_c, D, TILE_C) / (D * HW)

    b_dx = b_rstd[None, :] * (b_first_u - b_mean_u[None, :] - b_first * b_mean_dot[None, :])
    tl.store(dx + o_x, b_dx.to(dx.dtype.element_ty), mask=m_first)
    for i_p in range(1, (HW + BLOCK_P - 1) // BLOCK_P):
        m_x = m_c[None, :] & (i_p * BLOCK_P + o_p < HW)[:, None]
        o_block = o_x + i_p * (BLOCK_P * STRIDE_P)
        b_x = tl.load(x + o_block, mask=m_x, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + o_block, mask=m_x, other=0.0).to(tl.float32)
        b_normed = (b_x - b_centre[None, :]) * b_rstd[None, :]
        b_u = _normed_gradient(b_grad, b_normed, b_slope, b_offset, SILU)
        b_dx = b_rstd[None, :] * (b_u - b_mean_u[None, :] - b_normed * b_mean_dot[None, :])
        tl.store(dx + o_block, b_dx.to(dx.dtype.element_ty), mask=m_x)


@triton_op("dgfast::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, channel_bias: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """Gradient of `group_norm_silu` for x, [B, C, H, W] in the type and memory order of x.

    The activation is recomputed from x, mean and rstd: nothing as large as x is kept for it but x itself.
    """
    num_groups = mean.shape[1]
    check(x, num_groups, weight, bias)
    x = dense(x)
    grad, dx = ordered_like(grad, x), torch.empty_like(x)
    mean, rstd, weight, bias = (values.contiguous() for values in (mean, rstd, weight, bias))
    rows, strides = channel_rows(x, scale, shift, channel_bias)
    grid, fixed = launch_options(x, num_groups, silu, BACKWARD)
    with on_device_of(x):
        wrap_triton(group_norm_silu_backward_kernel)[grid](
            grad, x, mean, rstd, weight, bias, *rows, dx, *strides, **fixed
        )
    return dx


@group_norm_silu_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(dense(x))
