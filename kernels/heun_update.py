"""The second half of a Heun step: second slope, weighted mean and step, with the same extras as the Euler step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgfast.kernels.launch import coefficients, dense, elementwise_grid, ordered_like
from dgfast.kernels.tuning import ELEMENTWISE


@triton.jit
def heun_update_kernel(
    x: tl.tensor,  # [B, N]
    d: tl.tensor,  # [B, N]
    x_prime: tl.tensor,  # [B, N]
    denoised: tl.tensor,  # [B, N]
    gradient: tl.tensor,  # [B, N] or None
    a: tl.tensor,  # [B], in the type of the arithmetic, as all coefficients
    b: tl.tensor,
    h_first: tl.tensor,  # h (1 - w), the share of the first slope
    h_second: tl.tensor,  # h w
    gate: tl.tensor,  # [B]; None without a gradient
    c_in: tl.tensor,  # [B]; None without net_input
    x_next: tl.tensor,  # [B, N]
    net_input: tl.tensor,  # [B, N] or None
    N: int,
    BLOCK_N: tl.constexpr,
) -> None:
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_x = i_b * N + o_n
    b_h_first = tl.load(h_first + i_b)
    b_x = tl.load(x + o_x, mask=m_n, other=0.0).to(b_h_first.dtype)
    b_d = tl.load(d + o_x, mask=m_n, other=0.0).to(b_h_first.dtype)
    b_x_prime = tl.load(x_prime + o_x, mask=m_n, other=0.0).to(b_h_first.dtype)
    b_denoised = tl.load(denoised + o_x, mask=m_n, other=0.0).to(b_h_first.dtype)
    if gradient is not None:
        b_denoised += tl.load(gate + i_b) * tl.load(gradient + o_x, mask=m_n, other=0.0).to(b_h_first.dtype)
    b_d_prime = tl.load(a + i_b) * b_x_prime - tl.load(b + i_b) * b_denoised
    b_x_next = b_x + b_h_first * b_d + tl.load(h_second + i_b) * b_d_prime
    tl.store(x_next + o_x, b_x_next.to(x_next.dtype.element_ty), mask=m_n)
    if net_input is not None:
        b_net_input = (tl.load(c_in + i_b) * b_x_next).to(tl.float32)  # the interpreter casts no float64 to bfloat16
        tl.store(net_input + o_x, b_net_input.to(net_input.dtype.element_ty), mask=m_n)


@torch.library.custom_op("dgfast::heun_update", mutates_args=())
def heun_update(
    x: Tensor, d: Tensor, x_prime: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, w: float,
    gradient: Tensor | None, gate: Tensor | None, c_in: Tensor | None, net_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_next in the type of x and net_input in `net_dtype`, both [B, C, H, W]; without c_in net_input is empty.

    Args:
        x, d, x_prime, denoised: [B, C, H, W]; so is gradient where given.
        a, b, h, gate, c_in: B elements each. gradient and gate go together.
        w: share of the second slope.
    """
    x = dense(x)
    gradient = None if gradient is None else ordered_like(gradient, x)
    x_next, net_input = _outputs(x, c_in, net_dtype)
    # A float argument of a kernel is a float32, too coarse for a float64 state; h w is a tensor.
    with torch.cuda.device_of(x):
        heun_update_kernel[elementwise_grid(x)](
            x,
            *(ordered_like(other, x) for other in (d, x_prime, denoised)),
            gradient,
            *coefficients(x, a, b, h * (1 - w), h * w, gate, c_in),
            x_next,
            None if c_in is None else net_input,
            x.shape[1:].numel(),
            **ELEMENTWISE,
        )
    return x_next, net_input


def _outputs(x: Tensor, c_in: Tensor | None, net_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    net_input = x.new_empty(0, dtype=net_dtype) if c_in is None else torch.empty_like(x, dtype=net_dtype)
    return torch.empty_like(x), net_input


@heun_update.register_fake
def _(
    x: Tensor, d: Tensor, x_prime: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, w: float,
    gradient: Tensor | None, gate: Tensor | None, c_in: Tensor | None, net_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(dense(x), c_in, net_dtype)
