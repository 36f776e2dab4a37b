"""A pure function compiled for the CPU: traced once with its gradient, and fused.

Nothing beats the libraries' convolutions; they get their weights laid out once, images lie channels-last, and what
stands between them becomes C++ of our own, region by region (see `fusion`).

Graphs and compiled code are kept across runs in the folder of `cache_folder` (see `graph.cache` and `native.library`).
A second run loads both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.devices import keep_freed_memory
from dgfast.graph import Function
from dgfast.graph.cache import lowered
from dgfast.graph.trace import without_collecting
from dgfast.runtimes.cpu import onednn
from dgfast.runtimes.cpu.fusion import regions
from dgfast.runtimes.cpu.native import attention, library, winograd


def require() -> None:
    """
    Raises:
        UserError: there is no C++ compiler.
    """
    library.compiler()


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or there is no C++ compiler.
    """
    require()
    keep_freed_memory()
    with without_collecting():
        graph = compile(lowered(function, example), next((len(x) for x in example if x is not None and x.dim()), 1))

    @torch.no_grad()
    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return graph(*arguments)

    return run


def compile(graph: GraphModule, batch: int) -> GraphModule:
    """The lowered graph, changed in place: each node is a call of compiled code or of a library.

    Args:
        batch: samples in its arguments.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    regions.fuse(graph, batch)
    winograd.replace(graph)
    attention.replace(graph)
    if onednn.available():
        onednn.pack(graph)
    return graph
