"""What a trace depends on besides its function and arguments: versions, settings, and dgfast's code as it is in memory.

Somebody may have changed that code. A function or class put into dgfast or torch is seen here, and so is a number
behind a name of dgfast's; what is in a function (`__code__`, `__defaults__`) or in a table is not.
"""

import math
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgfast import IMPORTED_AT, ops
from dgfast.graph.key import NamelessError, inside, require_untouched

_ROOT = Path(__file__).parents[1]
_FLOAT32 = ("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv")
_ROOMS = ("denoiser", "guidance", "job", "nets", "noise_levels", "ops", "vp")  # where functions have their code
_PLAIN = (bool, int, float, str, tuple)
_CODE = (type, FunctionType, BuiltinFunctionType)


def environment(device: torch.device) -> dict[str, Any]:
    """What a trace on this device depends on besides the function and its arguments.

    Raises:
        NamelessError: hooks or modes that see every operation, or code that is not what the sources say.
    """
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    if watched or nn.modules.module._has_any_global_hook():
        raise NamelessError("hooks or modes that see every operation")
    attention, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "versions": (
            sys.version, str(torch.__version__), torch.version.git_version, sys.modules["numpy"].__version__, _triton(),
        ),
        "machine": (platform.machine(), torch.backends.cpu.get_cpu_capability()),
        "gpu": (torch.cuda.get_device_name(device), cudnn.version()) if device.type == "cuda" else None,
        "dgfast": (_sources(), _in_memory()),
        "kernels": [ops.takes_triton(device.type, measured) for measured in (True, False)],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(at), torch.get_autocast_dtype(at)) for at in ("cpu", device.type)],
        "deterministic": torch.get_deterministic_debug_mode(),
        "float32": [torch._C._get_fp32_precision_getter(*of) for of in _FLOAT32],  # the older getters may raise
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": (torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled),
        "attention": (
            attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled(),
            attention.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order(),
        ),
    }  # fmt: skip


@cache
def _triton() -> str | None:
    """The version of Triton, which what is compiled from the graph depends on."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    """A hash of dgfast's sources, which are those that this process runs."""
    files = (Path(at, name) for at, _, names in os.walk(_ROOT, followlinks=True) for name in names)
    paths = tuple(sorted(path for path in files if path.suffix == ".py"))
    name = _hash(paths)
    times = (time for path in paths for time in (path.stat().st_mtime, path.stat().st_ctime))
    if max(times, default=math.inf) > IMPORTED_AT:
        raise NamelessError("sources that are not there, or newer than this process")
    return name


@cache
def _hash(paths: tuple[Path, ...]) -> str:
    lines = [f"{path.relative_to(_ROOT)} {sha256(path.read_bytes()).hexdigest()}\n" for path in paths]
    return sha256("".join(lines).encode()).hexdigest()


def _in_memory() -> list[str]:
    """What stands behind the names that dgfast's code calls.

    Raises:
        NamelessError: code of somebody else, there or in torch.
    """
    for value in (*vars(torch).values(), *vars(Tensor).values()):
        require_untouched(value)
    rooms = [name for name in sorted(sys.modules) if name.startswith("dgfast.") and name.split(".")[1] in _ROOMS]
    return [line for home in (*rooms, functional.__name__) for line in _lines(home, sys.modules[home])]


def _lines(home: str, holder: Any) -> Iterator[str]:
    """A line for each function, class and plain value of a module, and of the classes that are defined there."""
    for name, value in [*vars(holder).items()]:
        require_untouched(value)
        value = inside(value)
        if isinstance(value, _CODE):
            yield f"{home}.{name} {value.__module__}.{value.__qualname__}"
        elif type(value) in _PLAIN and not name.startswith("__"):
            yield f"{home}.{name} {value!r}"
        if isinstance(value, type) and value.__module__ == home:
            yield from _lines(f"{home}.{name}", value)
