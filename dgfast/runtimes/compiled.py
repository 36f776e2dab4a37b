"""The guided denoiser through torch.compile.

On CUDA the whole lowered graph goes to inductor, which fuses and generates Triton. On the CPU nothing beats the
libraries' convolutions, which inductor calls as they are; there they get their weights laid out once, images lie
channels-last, and inductor generates what stands between them, region by region (see `regions`). That is as fast as
compiling the whole graph and several times quicker to compile.

Compiled code is kept across runs in inductor's cache: the folder in the environment's TORCHINDUCTOR_CACHE_DIR, or
torchinductor_<user> in the system's folder for temporary files. A second run loads it instead of compiling. On the CPU
helper processes share the compiling (see `precompile`).
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.errors import UserError
from dgfast.runtimes import onednn, regions
from dgfast.runtimes.graph import Function, lower, trace
from dgfast.runtimes.precompile import Helpers
from dgfast.runtimes.regions import Region


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or there is no C++ compiler for inductor.
    """
    _require_compiler(next(x for x in example if x is not None).device)
    if any(x is not None and x.is_cuda for x in example):
        return torch.compile(_lowered(function, example), fullgraph=True, dynamic=False)
    _keep_freed_memory()
    with Helpers() as helpers:
        graph = _lowered(function, example)
        regions.fuse(graph, partial(_compile_regions, helpers))
    if onednn.available():
        onednn.pack(graph)
    return _without_grad(graph)


def _lowered(function: Function, example: Sequence[Tensor | None]) -> GraphModule:
    return lower(trace(function, example), example, channels_last=True)


_COMPILED_REGIONS: dict[str, Callable[..., Any]] = {}
"""Regions of one kind are compiled once a process, whichever function they belong to."""


def _compile_regions(helpers: Helpers, extract: dict[str, Callable[[], Region]]) -> dict[str, Callable[..., Any]]:
    """A compiled function of every kind."""
    missing = {kind: cut() for kind, cut in extract.items() if kind not in _COMPILED_REGIONS}
    for kind in helpers.share(missing):
        _COMPILED_REGIONS[kind] = _compile_region(missing[kind])
    helpers.wait(list(missing))
    for kind in missing.keys() - _COMPILED_REGIONS.keys():
        _COMPILED_REGIONS[kind] = _compile_region(missing[kind])
    return {kind: _COMPILED_REGIONS[kind] for kind in extract}


def _compile_region(region: Region) -> Callable[..., Any]:
    from torch._inductor.exc import CppCompileError, InductorError

    try:
        return torch._inductor.compile(*region)
    except (InductorError, CppCompileError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"torch.compile failed: {reason}; run without --compile, or with --compile=try") from error


def _without_grad(graph: GraphModule) -> Function:
    @torch.no_grad()
    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return graph(*arguments)

    return run


def _require_compiler(device: torch.device) -> None:
    """Inductor compiles its host code with a C++ compiler on every device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "--compile needs a C++ compiler, and there is none: install g++ (Debian, Ubuntu: apt install g++), "
            "or use --compile=try to run without compiling"
        ) from error
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise UserError("--compile on CUDA needs Triton: pip install triton (Linux), or run without --compile")


def _keep_freed_memory() -> None:
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
