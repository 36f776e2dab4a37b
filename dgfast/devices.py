"""Which device and which number format to run in."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dgfast.errors import UserError

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""--dtype to the type of the weights; how what is float32 is computed says `precision`."""

_CUDA = {"products": ("cuda", "matmul"), "convolutions": ("cuda", "conv")}
_ON_CUDA = (*_CUDA.values(), ("cuda", "rnn"))
_ALL_SET = (*_ON_CUDA, ("mkldnn", "matmul"))  # by the two switches of `_allow`


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Compute in the number format of that name, one of `runtimes.PRECISIONS`; torch's flags are set back at the end.

    Inside, what is float32 is computed as such, but under "tf32", where convolutions and matrix products on CUDA round
    what they read to TensorFloat-32. Outside of any such block torch's own default holds, that convolutions alone do.
    It decides nothing about weights, whose type is that of `DTYPES`. What is built inside is to be called inside.

    Raises:
        UserError: another name.
    """
    if name not in DTYPES:
        raise UserError(f"no precision {name}: there are {', '.join(DTYPES)}")
    before = {what: torch._C._get_fp32_precision_getter(*what) for what in _ALL_SET}
    _allow(name == "tf32", "high" if name == "tf32" else "highest")
    for what in _ON_CUDA:  # the older switches leave to torch's general flag what they do not allow
        torch._C._set_fp32_precision_setter(*what, "tf32" if name == "tf32" else "ieee")
    try:
        yield
    finally:
        rounded = "medium" if before["mkldnn", "matmul"] == "bf16" else "high"
        _allow(before["cuda", "conv"] == "tf32", rounded if before["cuda", "matmul"] == "tf32" else "highest")
        for what, how in before.items():
            torch._C._set_fp32_precision_setter(*what, how)


def arithmetic() -> dict[str, str]:
    """How CUDA computes float32's "products" and "convolutions" here and now: "tf32" or "float32"."""
    # torch's older getters raise where somebody has set the newer flags.
    how = {what: torch._C._get_fp32_precision_getter(*of) for what, of in _CUDA.items()}
    return {what: "tf32" if value == "tf32" else "float32" for what, value in how.items()}


def _allow(convolutions: bool, products: str) -> None:
    # By torch's older switches, which set the newer flags too: inductor reads both (torch 2.11 to 2.13), and the older
    # ones cannot be read where the newer ones were set alone.
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


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


def own_device(name: str | None, local_rank: int) -> torch.device:
    """The device of this process, one of several on a machine: of its GPUs the next one, of the CPU the memory kept.

    Raises:
        UserError: see `pick_device`.
    """
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    if device.type == "cpu":
        keep_freed_memory()
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
