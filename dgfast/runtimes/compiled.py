"""The guided denoiser compiled: traced once with its gradient, and fused.

On CUDA the whole lowered graph goes to torch.compile, whose inductor fuses and generates Triton. On the CPU nothing
beats the libraries' convolutions; they get their weights laid out once, images lie channels-last, and what stands
between them becomes C++ of our own, region by region (see `fusion`).

Graphs and compiled code are kept across runs in the folder of `cache_folder` (see `graph_cache` and `native.library`),
what inductor compiles on CUDA in the folder in the environment's TORCHINDUCTOR_CACHE_DIR, or torchinductor_<user> in
the system's folder for temporary files. A second run loads all that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._triton import has_triton

from dgfast.devices import keep_freed_memory
from dgfast.errors import UserError
from dgfast.extras import how_to_install
from dgfast.runtimes import onednn
from dgfast.runtimes.fusion import regions
from dgfast.runtimes.graph import Function, without_collecting
from dgfast.runtimes.graph_cache import lowered
from dgfast.runtimes.native import attention, library, winograd
from dgfast.runtimes.streams import MOST_SAMPLES, concurrent


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or there is no C++ compiler for inductor.
    """
    first = next(x for x in example if x is not None)
    if first.is_cuda:
        _require_inductor()
        graph = lowered(function, example)
        return concurrent(graph, by_inductor) if len(first) <= MOST_SAMPLES else by_inductor(graph)
    keep_freed_memory()
    return _without_grad(on_cpu(function, example, len(first)))


def on_cpu(function: Function, example: Sequence[Tensor | None], batch: int) -> GraphModule:
    """The lowered graph, each node of which is a call of compiled code or of a library.

    Args:
        batch: samples in the tensors of `example`.
    """
    library.compiler()
    with without_collecting():
        graph = lowered(function, example)
        regions.fuse(graph, batch)
        winograd.replace(graph)
        attention.replace(graph)
        if onednn.available():
            onednn.pack(graph)
    return graph


def by_inductor(graph: nn.Module) -> Function:
    """A graph as inductor's kernels; they are compiled in the first call.

    Raises:
        UserError: in the first call, where inductor or one of the compilers that it calls fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, which takes a second

    compiled = torch.compile(graph, fullgraph=True, dynamic=False)

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        try:
            return compiled(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"torch.compile failed: {reason}; run without --compile, or with --compile=try") from error

    return run


def _without_grad(graph: GraphModule) -> Function:
    @torch.no_grad()
    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return graph(*arguments)

    return run


def _require_inductor() -> None:
    """Inductor compiles its host code with a C++ compiler."""
    library.compiler()
    if not has_triton():
        raise UserError(f"--compile on CUDA needs Triton: {how_to_install('triton')}, or run without --compile")
