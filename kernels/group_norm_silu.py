"""Group normalisation with everything that stands around it in a residual block, in one pass.

    z = GN(x + channel_bias) (1 + scale) + shift,    y = silu(z) or z

Variance: each lane of a tile runs Welford's recurrence over its pixels (Technometrics 4, 1962), then the lanes are
merged in two passes, mean first. Nothing of the form E[x^2] - E[x]^2 is computed, which cancels where the mean is
large beside the deviation.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from dgfast.kernels.group_norm import channel_row, channel_rows, check, group_sum, launch_options
from dgfast.kernels.group_norm_silu_backward import group_norm_silu_backward
from dgfast.kernels.launch import dense, on_device_of
from dgfast.kernels.tuning import FORWARD


@triton.jit
def _activated(
    b_x: tl.tensor, b_centre: tl.tensor, b_slope: tl.tensor, b_offset: tl.tensor, SILU: tl.constexpr
) -> tl.tensor:
    b_z = (b_x - b_centre[None, :]) * b_slope[None, :] + b_offset[None, :]
    if SILU:
        b_z = b_z / (1.0 + tl.exp(-b_z))
    return b_z


@triton.jit
def group_norm_silu_kernel(
    x: tl.tensor,  # [B, C, H, W], dense in either order
    weight: tl.tensor,  # [C]
    bias: tl.tensor,  # [C]
    scale: tl.tensor,  # [B, C] with contiguous rows, or None; so are shift and channel_bias
    shift: tl.tensor,
    channel_bias: tl.tensor,
    y: tl.tensor,  # [B, C, H, W] in the order of x
    mean: tl.tensor,  # [B, C // D] float32
    rstd: tl.tensor,
    scale_stride: int,
    shift_stride: int,
    channel_bias_stride: int,
    EPS: tl.constexpr,  # a number, which inductor would hand over in float64, and the kernel then compute in it
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

    # The first block starts the recurrence, and stays in registers until it is normalised.
    b_first = tl.load(x + o_x, mask=m_first, other=0.0).to(tl.float32)
    b_lane_mean = b_first
    b_lane_m2 = tl.zeros_like(b_first)
    for i_p in range(1, (HW + BLOCK_P - 1) // BLOCK_P):
        m_x = m_c[None, :] & (i_p * BLOCK_P + o_p < HW)[:, None]
        b_x = tl.load(x + o_x + i_p * (BLOCK_P * STRIDE_P), mask=m_x, other=0.0).to(tl.float32)
        b_delta = b_x - b_lane_mean
        if HW % BLOCK_P != 0:
            b_delta = tl.where(m_x, b_delta, 0.0)
        b_lane_mean += b_delta * (1.0 / (i_p + 1))
        b_lane_m2 += b_delta * (b_x - b_lane_mean)

    b_channel_bias = channel_row(channel_bias, i_b * channel_bias_stride, i_c, m_c)
    b_count = ((HW - o_p + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # pixels that each lane has seen
    b_lane_mean += b_channel_bias[None, :]
    b_mean = group_sum(tl.sum(b_lane_mean * b_count, axis=0), o_c, D, TILE_C) / (D * HW)
    b_delta = tl.where(m_c[None, :], b_lane_mean - b_mean[None, :], 0.0)
    b_lane_m2 += b_count * b_delta * b_delta
    b_rstd = tl.rsqrt(group_sum(tl.sum(b_lane_m2, axis=0), o_c, D, TILE_C) / (D * HW) + EPS)
    o_g = i_b * (C // D) + i_c // D
    m_g = m_c & (i_c % D == 0)
    tl.store(mean + o_g, b_mean, mask=m_g)
    tl.store(rstd + o_g, b_rstd, mask=m_g)

    b_factor = channel_row(scale, i_b * scale_stride, i_c, m_c) + 1.0
    b_slope = channel_row(weight, 0, i_c, m_c) * b_factor * b_rstd
    b_offset = channel_row(bias, 0, i_c, m_c) * b_factor + channel_row(shift, i_b * shift_stride, i_c, m_c)
    b_centre = b_mean - b_channel_bias
    b_y = _activated(b_first, b_centre, b_slope, b_offset, SILU)
    tl.store(y + o_x, b_y.to(y.dtype.element_ty), mask=m_first)
    for i_p in range(1, (HW + BLOCK_P - 1) // BLOCK_P):
        m_x = m_c[None, :] & (i_p * BLOCK_P + o_p < HW)[:, None]
        o_block = o_x + i_p * (BLOCK_P * STRIDE_P)
        b_x = tl.load(x + o_block, mask=m_x, other=0.0).to(tl.float32)
        b_y = _activated(b_x, b_centre, b_slope, b_offset, SILU)
        tl.store(y + o_block, b_y.to(y.dtype.element_ty), mask=m_x)


@triton_op("dgfast::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None,
    shift: Tensor | None, channel_bias: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, C, H, W] in the type and memory order of x, and each group's mean and 1 / deviation [B, G], float32.

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16.
        weight, bias: [C]; scale, shift, channel_bias: [B, C] or None.
    """
    check(x, num_groups, weight, bias)
    x = dense(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), num_groups, dtype=torch.float32) for _ in range(2))
    weight, bias = weight.contiguous(), bias.contiguous()
    rows, strides = channel_rows(x, scale, shift, channel_bias)
    grid, fixed = launch_options(x, num_groups, silu, FORWARD)
    with on_device_of(x):
        wrap_triton(group_norm_silu_kernel)[grid](x, weight, bias, *rows, y, mean, rstd, *strides, EPS=eps, **fixed)
    return y, mean, rstd


@group_norm_silu.register_fake
def _(x: Tensor, num_groups: int, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), mean, rstd


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _, scale, shift, channel_bias, silu = inputs
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "the Triton group_norm_silu has a gradient for x alone: freeze the network (requires_grad_(False)), "
            'or train under dgfast.ops.kernels("reference")'
        )
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, channel_bias)
    ctx.silu = silu


def _input_gradient(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    return group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.silu), *[None] * 8


group_norm_silu.register_autograd(_input_gradient, setup_context=_remember)
