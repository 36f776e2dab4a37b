"""An Euler step: slope, step, and where wanted the guidance before and the network's next input after, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.launch import coefficients, dense, elementwise_grid, ordered_like
from dgfast.kernels.tuning import ELEMENTWISE


@triton.jit
def euler_update_kernel(
    x: tl.tensor,  # [B, N]
    denoised: tl.tensor,  # [B, N]
    gradient: tl.tensor,  # [B, N] or None
    a: tl.tensor,  # [B], in the type of the arithmetic, as all coefficients
    b: tl.tensor,
    h: tl.tensor,
    gate: tl.tensor,  # [B]; None without a gradient
    c_in: tl.tensor,  # [B]; None without net_input
    x_next: tl.tensor,  # [B, N]
    d: tl.tensor,  # [B, N]
    net_input: tl.tensor,  # [B, N] or None
    N: int,
    BLOCK_N: tl.constexpr,
) -> None:
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = i_b * N + o_n
    b_h = tl.load(h + i_b)
    b_x = tl.load(x + o_x, mask=m_n, other=0.0).to(b_h.dtype)
    b_denoised = tl.load(denoised + o_x, mask=m_n, other=0.0).to(b_h.dtype)
    if gradient is not None:
        b_denoised += tl.load(gate + i_b) * tl.load(gradient + o_x, mask=m_n, other=0.0).to(b_h.dtype)
    b_d = tl.load(a + i_b) * b_x - tl.load(b + i_b) * b_denoised
    b_x_next = b_x + b_h * b_d
    tl.store(d + o_x, b_d.to(d.dtype.element_ty), mask=m_n)
    tl.store(x_next + o_x, b_x_next.to(x_next.dtype.element_ty), mask=m_n)
    if net_input is not None:
        b_net_input = (tl.load(c_in + i_b) * b_x_next).to(tl.float32)  # the interpreter casts no float64 to bfloat16
        tl.store(net_input + o_x, b_net_input.to(net_input.dtype.element_ty), mask=m_n)


@torch.library.custom_op("dgfast::euler_update", mutates_args=())
def euler_update(
    x: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, gradient: Tensor | None, gate: Tensor | None,
    c_in: Tensor | None, net_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x_next and d in the type of x, net_input in `net_dtype`, all [B, C, H, W]; without c_in net_input is empty.

    Args:
        x: [B, C, H, W]; so are denoised and, where given, gradient.
        a, b, h, gate, c_in: B elements each. gradient and gate go together.
    """
    x = dense(x)
    denoised = ordered_like(denoised, x)
    gradient = None if gradient is None else ordered_like(gradient, x)
    x_next, d, net_input = _outputs(x, c_in, net_dtype)
    with torch.cuda.device_of(x):
        euler_update_kernel[elementwise_grid(x)](
            x,
            denoised,
            gradient,
            *coefficients(x, a, b, h, gate, c_in),
            x_next,
            d,
            None if c_in is None else net_input,
            x.shape[1:].numel(),
            **ELEMENTWISE,
        )
    return x_next, d, net_input


def _outputs(x: Tensor, c_in: Tensor | None, net_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    net_input = x.new_empty(0, dtype=net_dtype) if c_in is None else torch.empty_like(x, dtype=net_dtype)
    return torch.empty_like(x), torch.empty_like(x), net_input


@euler_update.register_fake
def _(
    x: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, gradient: Tensor | None, gate: Tensor | None,
    c_in: Tensor | None, net_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(dense(x), c_in, net_dtype)
