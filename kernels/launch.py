"""What every launcher needs: where kernels can run, on which device one is launched, tensors in one memory order."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor, nn

_OLDEST = (7, 0)  # compute capability of which Triton makes code


def devices() -> tuple[str, ...]:
    """The types of device on which a kernel can be launched: the CPU only in Triton's interpreter."""
    return ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)


def obstacle() -> str | None:
    """What keeps Triton from running on this machine's GPUs, None if nothing does."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler, which Triton calls"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if min(capabilities, default=_OLDEST) < _OLDEST:
        return f"a GPU older than compute capability {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: that of x. What stands for x in a trace has none."""
    return torch.cuda.device_of(x) if type(x) in (Tensor, nn.Parameter) else nullcontext()


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
