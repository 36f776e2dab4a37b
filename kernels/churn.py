"""The rise of the noise level: x_hat = scale_x x + scale_noise noise, two coefficients a sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.launch import coefficients, dense, elementwise_grid, ordered_like
from dgfast.kernels.tuning import ELEMENTWISE


@triton.jit
def churn_kernel(
    x: tl.tensor,  # [B, N]
    noise: tl.tensor,  # [B, N]
    scale_x: tl.tensor,  # [B], in the type of the arithmetic
    scale_noise: tl.tensor,  # [B]
    x_hat: tl.tensor,  # [B, N]
    N: int,
    BLOCK_N: tl.constexpr,
) -> None:
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_scale_x = tl.load(scale_x + i_b)
    b_scale_noise = tl.load(scale_noise + i_b)
    b_x = tl.load(x + i_b * N + o_n, mask=m_n, other=0.0).to(b_scale_x.dtype)
    b_noise = tl.load(noise + i_b * N + o_n, mask=m_n, other=0.0).to(b_scale_x.dtype)
    b_x_hat = b_scale_x * b_x + b_scale_noise * b_noise
    tl.store(x_hat + i_b * N + o_n, b_x_hat.to(x_hat.dtype.element_ty), mask=m_n)


@torch.library.custom_op("dgfast::churn", mutates_args=())
def churn(x: Tensor, noise: Tensor, scale_x: Tensor, scale_noise: Tensor) -> Tensor:
    """x_hat [B, C, H, W] in the type and memory order of x; the coefficients have B elements."""
    x = dense(x)
    noise, x_hat = ordered_like(noise, x), torch.empty_like(x)
    scales = coefficients(x, scale_x, scale_noise)
    with torch.cuda.device_of(x):
        churn_kernel[elementwise_grid(x)](x, noise, *scales, x_hat, x.shape[1:].numel(), **ELEMENTWISE)
    return x_hat


@churn.register_fake
def _(x: Tensor, noise: Tensor, scale_x: Tensor, scale_noise: Tensor) -> Tensor:
    return torch.empty_like(dense(x))
