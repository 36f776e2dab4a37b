"""What every launcher needs: where kernels can run, tensors in one memory order, coefficients in one type."""

import torch
import triton
from torch import Tensor

from dgfast.kernels.tuning import ELEMENTWISE


def devices() -> tuple[str, ...]:
    """The types of device on which a kernel can be launched: the CPU only in Triton's interpreter."""
    return ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)


def dense(x: Tensor) -> Tensor:
    """x [B, C, H, W] if it fills its memory in NCHW or NHWC (channels-last) order, else a channels-last copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def ordered_like(other: Tensor, x: Tensor) -> Tensor:
    """`other` in the memory order of the dense tensor x of the same shape; itself if it is so already.

    Raises:
        ValueError: another shape or device, which a kernel would read past the end.
    """
    if other.shape != x.shape or other.device != x.device:
        raise ValueError(f"{tuple(other.shape)} on {other.device} does not match {tuple(x.shape)} on {x.device}")
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return other.contiguous(memory_format=order)


def coefficients(x: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    """One number a sample, each [B], in the type in which the kernel computes: the widest of theirs and x's.

    None, for what a kernel does without, stays None.

    Raises:
        ValueError: not one number a sample.
    """
    compute = x.dtype
    for value in values:
        if value is not None:
            if value.numel() != len(x) or value.device != x.device:
                raise ValueError(f"{value.numel()} coefficients on {value.device} for {len(x)} samples on {x.device}")
            compute = torch.promote_types(compute, value.dtype)
    return [None if value is None else value.reshape(-1).to(compute).contiguous() for value in values]


def elementwise_grid(x: Tensor) -> tuple[int, int]:
    """Programs for a tensor [B, ...]: sample by block, since the coefficients are one a sample."""
    return len(x), triton.cdiv(x.shape[1:].numel(), ELEMENTWISE["BLOCK_N"])
