"""A pure function compiled for CUDA: traced once with its gradient, and given to inductor, which generates Triton.

The lowered graph is kept across runs (see `graph.cache`), and so is what inductor compiles: in the folder of the
environment's TORCHINDUCTOR_CACHE_DIR, or torchinductor_<user> in the system's folder for temporary files.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from dgfast.errors import UserError
from dgfast.extras import how_to_install
from dgfast.graph import Function
from dgfast.graph.cache import lowered
from dgfast.runtimes.cpu.native import library
from dgfast.runtimes.cuda.streams import MOST_SAMPLES, concurrent


def require() -> None:
    """
    Raises:
        UserError: there is no C++ compiler, with which inductor compiles its host code, or no Triton.
    """
    library.compiler()
    if not has_triton():
        raise UserError(f"--compile on CUDA needs Triton: {how_to_install('triton')}, or run without --compile")


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or see `require`.
    """
    require()
    graph, batch = lowered(function, example), len(next(x for x in example if x is not None))
    return concurrent(graph, by_inductor) if batch <= MOST_SAMPLES else by_inductor(graph)


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
