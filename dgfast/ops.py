"""The operations that have Triton kernels: what they are, in plain torch, and the switch between both.

    with ops.kernels("reference"):
        images = sampler(seeds)

`group_norm_silu_reference` and `attention_reference` are the definitions: differentiable, exportable, and what runs on
the CPU. Left to themselves ("auto"), tensors on CUDA take those kernels of dgfast/kernels that were measured to be
faster, wherever Triton can run; with "triton" they take all. The choice is made when the operation is called; a trace
or a compiled function keeps the choice of its making.

Group normalisation was measured on an H200, `edm-cifar10` at batch 512 in bfloat16, one compiled guided call: 97.8 ms
with the kernel and its input gradient, 106.7 ms with what inductor makes of the reference. Attention has not been
measured yet (`python benchmarks/gpu.py` times both). The solver's updates have no kernels: inductor writes the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.errors import UserError
from dgfast.extras import how_to_install

Choice = Literal["auto", "reference", "triton"]
KERNELS = ("group_norm_silu", "attention")
"""Operations that have one."""

_CHOICE: ContextVar[Choice] = ContextVar("dgfast_kernels", default="auto")


@contextmanager
def kernels(choice: Choice) -> Iterator[None]:
    """Which implementation the operations called inside take; outside of any such block, "auto".

    With "triton", tensors on the CPU still take the reference, unless Triton's interpreter is on (TRITON_INTERPRET=1).
    "auto" takes the reference where Triton cannot run, or no GPU has shown that the kernel is faster; "triton" takes
    every kernel, and fails where there is no Triton.

    Raises:
        UserError: another name, or "triton" where it cannot be imported.
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


def require_kernels(choice: Choice, device: str) -> None:
    """
    Raises:
        UserError: kernels were asked for that tensors on devices of that type do not take.
    """
    with kernels(choice):
        if choice == "triton" and not takes_triton(device):
            raise UserError(
                f"the Triton kernels run on CUDA, not on {device}: use the reference or auto, "
                "or Triton's interpreter (TRITON_INTERPRET=1)"
            )


def takes_triton(device: str, measured: bool = True) -> bool:
    """Whether an operation takes its kernel for tensors on devices of that type, as chosen here and now.

    Args:
        measured: whether a GPU has shown that this kernel is faster than the reference.
    """
    choice = _CHOICE.get()
    if choice == "auto":
        return measured and device == "cuda" and _triton_runs()
    if choice == "reference":
        return False
    from dgfast.kernels.launch import devices

    return device in devices()


# torch.compile sees into no ContextVar. This is torch.compiler.assume_constant_result without its import of the whole
# compiler, which takes as long as torch itself.
takes_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_runs() -> bool:
    try:
        from dgfast.kernels.launch import obstacle
    except ImportError:
        return False
    return obstacle() is None


def register(name: str) -> None:
    """Make the kernel `torch.ops.dgfast.<name>` known to torch, for a graph that was read from a file.

    Raises:
        ImportError: there is none, or no Triton.
    """
    import_module(f"dgfast.kernels.{name}")


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None,
    shift: Tensor | None = None, channel_bias: Tensor | None = None, silu: bool = True,
) -> Tensor:  # fmt: skip
    """silu(GN(x + channel_bias) (1 + scale) + shift), or the same without the silu.

    Args:
        x: [B, C, H, W] in float32, bfloat16 or float16, in any memory order, for the kernel.
        weight, bias: [C], the affine map of the normalisation.
        scale, shift, channel_bias: [B, C], or None for 0.

    Returns:
        [B, C, H, W] in the type of x; from the kernel, in the memory order of x.

    The kernel keeps nothing for its input gradient but x and the statistics. Whatever it has not takes the reference
    always: float64, x of other ranks, and a gradient for another argument than x, as in training.
    """
    others = (weight, bias, scale, shift, channel_bias)
    if (
        takes_triton(x.device.type)
        and x.ndim == 4
        and x.dtype != torch.float64
        and not (torch.is_grad_enabled() and any(other is not None and other.requires_grad for other in others))
    ):
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
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as autocast does by itself on CUDA; on a CPU a bfloat16 gradient takes three times as long
    z = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        z = z * (scale[:, :, None, None] + 1)
    if shift is not None:
        z = z + shift[:, :, None, None]
    return F.silu(z) if silu else z


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head (arXiv 1706.03762).

    Args:
        qkv: queries, keys and values, [3, B, heads, tokens, D].

    Returns:
        [B, heads, tokens, D] in the type of qkv.

    The kernel reads qkv as it lies, if it has no gaps and the D channels lie next to each other, and its gradient lies
    likewise: nothing is copied in between. It has half precision and 16, 32, 64 or 128 channels; all else takes the
    reference. A second derivative of the kernel is refused by torch with a RuntimeError.
    """
    if takes_triton(qkv.device.type, measured=False):
        from dgfast.kernels.attention import attention as launch
        from dgfast.kernels.tokens import multiplies, obstacle

        if multiplies(qkv.dtype) and obstacle(qkv) is None:
            return launch(qkv)[0]
    return attention_reference(qkv)


def attention_reference(qkv: Tensor) -> Tensor:
    """The definition of `attention`, by PyTorch's choice among the libraries that it has for it."""
    return F.scaled_dot_product_attention(*qkv)
