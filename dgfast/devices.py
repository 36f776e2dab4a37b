"""Which device and which number format to run in."""

import ctypes
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from dgfast.errors import UserError

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""--dtype to the type of the weights; tf32 is float32 with TensorFloat-32 matrix products."""


def device_of(net: object) -> torch.device:
    """Where the weights of `net` are; the CPU for a callable that is no module, or has none."""
    weights = net.parameters() if isinstance(net, nn.Module) else iter(())
    return next((parameter.device for parameter in weights), torch.device("cpu"))


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one and the CPU elsewhere.

    Raises:
        UserError: no such device on this machine, or one without float64.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device cpu") from error
    if device.type == "meta":
        raise UserError(f"--device {name}: tensors have no values there; try --device cpu")
    require_float64(device)
    return device


def describe(device: torch.device) -> str:
    """The device with the name of its GPU, if it is one."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the second call takes on that device; the first one warms up."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def require_float64(device: torch.device) -> None:
    """
    Raises:
        UserError: the device has no float64, as Apple's (mps) has none.
    """
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError as error:
        raise UserError(
            f"device {device.type} has no float64, in which noise levels and the sampler's state are held; use cpu"
        ) from error


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed: pages returned after every call are faulted in again by the next.

    A U-Net call at batch 64 frees some hundred megabytes, in pieces above malloc's thresholds, and getting them back
    costs thousands of page faults.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
                mallopt(parameter, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
