"""The operations that have a Triton kernel: what each one is, in plain torch, and the one switch between the two.

    with ops.kernels("triton"):
        images = sampler(seeds)

The functions named `*_reference` are the definition: differentiable, exportable, and what runs unless Triton is
chosen. A kernel of dgfast/kernels replaces its reference where Triton is chosen and can run: on a GPU, or anywhere in
Triton's interpreter. The choice is made when an operation is called; a trace or a compiled function keeps the choice
of its making.

Why a kernel might pay is argued here by bytes moved, since nobody has measured these kernels on a GPU yet. A "pass" is
one reading or writing of a whole tensor like x; "torch.compile" stands for what its fusion can reach at best.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.errors import UserError
from dgfast.extras import how_to_install

Choice = Literal["reference", "triton"]

_CHOICE: ContextVar[Choice] = ContextVar("dgfast_kernels", default="reference")


@contextmanager
def kernels(choice: Choice) -> Iterator[None]:
    """Which implementation the operations called inside take; outside of any such block, the reference.

    With "triton", tensors on the CPU still take the reference, unless Triton's interpreter is on (TRITON_INTERPRET=1).

    Raises:
        UserError: another name, or Triton cannot be imported.
    """
    if choice not in get_args(Choice):
        raise UserError(f"kernels {choice!r} do not exist; choose one of: {', '.join(get_args(Choice))}")
    if choice == "triton":
        try:
            import_module("dgfast.kernels.launch")
        except ImportError as error:
            raise UserError(
                f"the Triton kernels cannot be imported ({error}): {how_to_install('triton')}, or use the reference"
            ) from error
    token = _CHOICE.set(choice)
    try:
        yield
    finally:
        _CHOICE.reset(token)


def _by_triton(x: Tensor) -> bool:
    return x.device.type in triton_devices()


def triton_devices() -> tuple[str, ...]:
    """The types of device on whose tensors the operations take a kernel, as chosen here and now."""
    if _CHOICE.get() != "triton":
        return ()
    from dgfast.kernels.launch import devices

    return devices()


# torch.compile sees into no ContextVar. This is torch.compiler.assume_constant_result without its import of the whole
# compiler, which takes as long as torch itself.
triton_devices._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register(name: str) -> None:
    """Make the kernel `torch.ops.dgfast.<name>` known to torch, for a graph that was read from a file.

    Raises:
        ImportError: there is none, or no Triton.
    """
    import_module(f"dgfast.kernels.{name}")


# Group normalisation --------------------------------------------------------------------------------------------------
def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, channel_bias: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """silu(GN(x + channel_bias) (1 + scale) + shift), or the same without the silu.

    Args:
        x: [B, C, H, W] in float32, bfloat16 or float16, in any memory order; float64 takes the reference always.
        weight, bias: [C], the affine map of the normalisation.
        scale, shift, channel_bias: [B, C], or None for 0.

    Returns:
        [B, C, H, W] in the type of x; from the kernel, in the memory order of x.

    Passes forward: 5 in eager torch (statistics, normalise, silu; and 2 more each for scale, shift and channel_bias),
    3 under torch.compile; 2 in the kernel where a program's share of the image fits in registers (to about 16 x 16
    pixels in bfloat16), else 3, of which one mostly from L2. On a GPU eager group_norm works in NCHW alone, so that a
    channels-last network pays 2 more to leave its order and 2 to come back. Input gradient: 8 in eager torch, 5 under
    torch.compile, 3 in the kernel to about 8 x 8 pixels, else 5, two of them mostly from L2. It recomputes the
    activation and so keeps nothing but x.

    The kernel has a gradient for x alone and raises RuntimeError if another argument requires one.
    """
    if _by_triton(x) and x.dtype != torch.float64:
        from dgfast.kernels.group_norm_silu import group_norm_silu as launch

        return launch(x, num_groups, weight, bias, eps, scale, shift, channel_bias, silu)[0]
    return group_norm_silu_reference(x, num_groups, weight, bias, eps, scale, shift, channel_bias, silu)


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, channel_bias: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """The definition of `group_norm_silu` (Wu and He, arXiv 1803.08494; scale and shift: arXiv 2102.09672)."""
    if channel_bias is not None:
        x = x + channel_bias[:, :, None, None]
    z = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        z = z * (scale[:, :, None, None] + 1)
    if shift is not None:
        z = z + shift[:, :, None, None]
    return F.silu(z) if silu else z


# Guidance -------------------------------------------------------------------------------------------------------------
def guide(denoised: Tensor, gradient: Tensor, gate: Tensor) -> Tensor:
    """denoised + gate gradient, with one gate a sample, such as weight inside_window sigma^2 alpha.

    Args:
        denoised, gradient: [B, C, H, W], each in any floating-point type.
        gate: B elements. The window is judged in float64 by the caller: B numbers are no work for a kernel.

    Returns:
        [B, C, H, W] in the type of `denoised`, computed in the wider type of `denoised` and `gate`.

    Bytes an element with float64 images and a float32 gradient: 36 in eager torch, 20 in the kernel and under
    torch.compile.
    """
    if _by_triton(denoised):
        from dgfast.kernels.guide import guide as launch

        return launch(denoised, gradient, gate)
    return guide_reference(denoised, gradient, gate)


def guide_reference(denoised: Tensor, gradient: Tensor, gate: Tensor) -> Tensor:
    """The definition of `guide`."""
    (gate,) = _coefficients(denoised, gate)
    return (denoised + gate * gradient).to(denoised.dtype)


# Solver ---------------------------------------------------------------------------------------------------------------
# All of these move a few dozen bytes an element of an image of three channels, thousands of times less than the
# networks of the same step: what the kernels save is mostly launches, and only where the step is not compiled.
def churn(x: Tensor, noise: Tensor, scale_x: Tensor, scale_noise: Tensor) -> Tensor:
    """scale_x x + scale_noise noise: the state at a raised noise level (EDM, arXiv 2206.00364, algorithm 2, line 6).

    Args:
        x, noise: [B, C, H, W]; scale_x, scale_noise: B elements each.

    Returns:
        [B, C, H, W] in the type of x, computed in the widest type of x and the coefficients.

    Bytes an element with a float64 state: 56 in eager torch, 24 in the kernel and under torch.compile.
    """
    if _by_triton(x):
        from dgfast.kernels.churn import churn as launch

        return launch(x, noise, scale_x, scale_noise)
    return churn_reference(x, noise, scale_x, scale_noise)


def churn_reference(x: Tensor, noise: Tensor, scale_x: Tensor, scale_noise: Tensor) -> Tensor:
    """The definition of `churn`."""
    scale_x, scale_noise = _coefficients(x, scale_x, scale_noise)
    return (scale_x * x + scale_noise * noise).to(x.dtype)


def euler_update(
    x: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, gradient: Tensor | None = None,
    gate: Tensor | None = None, c_in: Tensor | None = None, net_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """One Euler step x_next = x + h d along d = a x - b (denoised + gate gradient) (EDM, algorithm 1).

    Args:
        x, denoised: [B, C, H, W]; so is gradient, which comes with gate or not at all.
        a, b, h, gate, c_in: B elements each. `Coordinates.slope` is of this form.
        c_in: asks for the network's next input too, c_in x_next in `net_dtype`.

    Returns:
        x_next and d in the type of x, computed in the widest type of x and the coefficients; net_input or None.

    Bytes an element with a float64 state and float32 denoised images: 92 in eager torch, 28 in the kernel and under
    torch.compile; a float32 gradient adds 52 and 4, a bfloat16 net_input 26 and 2.
    """
    assert (gradient is None) == (gate is None)
    if _by_triton(x):
        from dgfast.kernels.euler_update import euler_update as launch

        x_next, d, net_input = launch(x, denoised, a, b, h, gradient, gate, c_in, net_dtype)
        return x_next, d, None if c_in is None else net_input
    return euler_update_reference(x, denoised, a, b, h, gradient, gate, c_in, net_dtype)


def euler_update_reference(
    x: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, gradient: Tensor | None = None,
    gate: Tensor | None = None, c_in: Tensor | None = None, net_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The definition of `euler_update`."""
    a, b, h = _coefficients(x, a, b, h)
    d = a * x - b * _guided(denoised, gradient, gate, a.dtype)
    x_next = x + h * d
    return x_next.to(x.dtype), d.to(x.dtype), _net_input(x_next, c_in, net_dtype)


def heun_update(
    x: Tensor, d: Tensor, x_prime: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, w: float,
    gradient: Tensor | None = None, gate: Tensor | None = None, c_in: Tensor | None = None,
    net_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The second half of a Heun step, x_next = x + h ((1 - w) d + w d_prime) (EDM, algorithm 3).

    d_prime = a x_prime - b (denoised + gate gradient) is the slope at the second point, x_prime.

    Args:
        x, d, x_prime, denoised: [B, C, H, W]; so is gradient, which comes with gate or not at all.
        a, b, h, gate, c_in: B elements each.
        w: share of the second slope, 1 / (2 alpha): 0.5 at alpha 1.
        c_in: asks for the network's next input too, c_in x_next in `net_dtype`.

    Returns:
        x_next in the type of x, computed in the widest type of x and the coefficients; net_input or None.

    Bytes an element with a float64 state and float32 denoised images: 148 in eager torch, 36 in the kernel and under
    torch.compile; the extras as for `euler_update`.
    """
    assert (gradient is None) == (gate is None)
    if _by_triton(x):
        from dgfast.kernels.heun_update import heun_update as launch

        x_next, net_input = launch(x, d, x_prime, denoised, a, b, h, w, gradient, gate, c_in, net_dtype)
        return x_next, None if c_in is None else net_input
    return heun_update_reference(x, d, x_prime, denoised, a, b, h, w, gradient, gate, c_in, net_dtype)


def heun_update_reference(
    x: Tensor, d: Tensor, x_prime: Tensor, denoised: Tensor, a: Tensor, b: Tensor, h: Tensor, w: float,
    gradient: Tensor | None = None, gate: Tensor | None = None, c_in: Tensor | None = None,
    net_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition of `heun_update`."""
    a, b, h = _coefficients(x, a, b, h)
    d_prime = a * x_prime - b * _guided(denoised, gradient, gate, a.dtype)
    x_next = x + h * ((1 - w) * d + w * d_prime)
    return x_next.to(x.dtype), _net_input(x_next, c_in, net_dtype)


def _coefficients(x: Tensor, *values: Tensor) -> list[Tensor]:
    """One number a sample, each [B, 1, 1, 1], in the widest type of theirs and x's."""
    compute = x.dtype
    for value in values:
        compute = torch.promote_types(compute, value.dtype)
    return [value.reshape(-1, 1, 1, 1).to(compute) for value in values]


def _guided(denoised: Tensor, gradient: Tensor | None, gate: Tensor | None, compute: torch.dtype) -> Tensor:
    return denoised if gradient is None or gate is None else guide_reference(denoised.to(compute), gradient, gate)


def _net_input(x: Tensor, c_in: Tensor | None, net_dtype: torch.dtype) -> Tensor | None:
    return None if c_in is None else (_coefficients(x, c_in)[0] * x).to(net_dtype)
