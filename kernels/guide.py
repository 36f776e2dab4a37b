"""A guidance's correction of the denoised image: denoised + gate direction, one gate a sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.launch import coefficients, dense, elementwise_grid, ordered_like
from dgfast.kernels.tuning import ELEMENTWISE


@triton.jit
def guide_kernel(
    denoised: tl.tensor,  # [B, N]
    gradient: tl.tensor,  # [B, N]
    gate: tl.tensor,  # [B], in the type of the arithmetic
    guided: tl.tensor,  # [B, N]
    N: int,
    BLOCK_N: tl.constexpr,
) -> None:
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_gate = tl.load(gate + i_b)
    b_denoised = tl.load(denoised + i_b * N + o_n, mask=m_n, other=0.0).to(b_gate.dtype)
    b_gradient = tl.load(gradient + i_b * N + o_n, mask=m_n, other=0.0).to(b_gate.dtype)
    b_guided = b_denoised + b_gate * b_gradient
    tl.store(guided + i_b * N + o_n, b_guided.to(guided.dtype.element_ty), mask=m_n)


@torch.library.custom_op("dgfast::guide", mutates_args=())
def guide(denoised: Tensor, gradient: Tensor, gate: Tensor) -> Tensor:
    """The guided image [B, C, H, W] in the type and memory order of `denoised`; `gate` has B elements."""
    denoised = dense(denoised)
    gradient, guided = ordered_like(gradient, denoised), torch.empty_like(denoised)
    with torch.cuda.device_of(denoised):
        guide_kernel[elementwise_grid(denoised)](
            denoised, gradient, *coefficients(denoised, gate), guided, denoised.shape[1:].numel(), **ELEMENTWISE
        )
    return guided


@guide.register_fake
def _(denoised: Tensor, gradient: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(dense(denoised))
