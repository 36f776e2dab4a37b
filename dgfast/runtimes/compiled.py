"""The guided denoiser compiled: traced once with its gradient, and fused.

On CUDA the whole lowered graph goes to torch.compile, whose inductor fuses and generates Triton. On the CPU nothing
beats the libraries' convolutions; they get their weights laid out once, images lie channels-last, and what stands
between them becomes C++ of our own, region by region (see `fusion`).

Graphs and compiled code are kept across runs in the folder of `cache_folder` (see `graph_cache` and `fusion.library`),
what inductor compiles on CUDA in the folder in the environment's TORCHINDUCTOR_CACHE_DIR, or torchinductor_<user> in
the system's folder for temporary files. A second run loads all that.
"""

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.errors import UserError
from dgfast.runtimes import onednn
from dgfast.runtimes.fusion import library, regions
from dgfast.runtimes.graph import Function, without_collecting
from dgfast.runtimes.graph_cache import lowered


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or there is no C++ compiler for inductor.
    """
    first = next(x for x in example if x is not None)
    if first.is_cuda:
        _require_inductor()
        return torch.compile(lowered(function, example), fullgraph=True, dynamic=False)
    library.compiler()
    _keep_freed_memory()
    with without_collecting():
        graph = lowered(function, example)
        regions.fuse(graph, len(first))
        if onednn.available():
            onednn.pack(graph)
    return _without_grad(graph)


def _without_grad(graph: GraphModule) -> Function:
    @torch.no_grad()
    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return graph(*arguments)

    return run


def _require_inductor() -> None:
    """Inductor compiles its host code with a C++ compiler."""
    library.compiler()
    if not torch.utils._triton.has_triton():
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
