"""A pure function compiled for CUDA: traced once with its gradient, and given to inductor, which generates Triton.

The lowered graph is kept across runs (see `graph.cache`), and so is what AOTInductor compiles of it (see
`package.build`): a second run loads both.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._triton import has_triton

from dgfast.errors import UserError
from dgfast.extras import how_to_install
from dgfast.graph import Function
from dgfast.graph.cache import lowered
from dgfast.runtimes.cpu.native import library
from dgfast.runtimes.cuda.streams import MOST_SAMPLES, concurrent, split
from dgfast.runtimes.package.build import compile_missing, compiled

_LOG = logging.getLogger(__name__)


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
    graph, device = lowered(function, example), _first(example).device

    def compile(part: nn.Module, name: str) -> Callable[..., Any]:
        assert isinstance(part, GraphModule)
        return ahead_of_time(part, _example_of(part, device), name)

    return concurrent(graph, compile) if _samples(example) <= MOST_SAMPLES else compile(graph, "")


def prepare(functions: Sequence[tuple[Function, Sequence[Tensor | None]]]) -> None:
    """Compile what `build` will ask for and no earlier run has kept, side by side."""
    require()

    def pieces() -> Iterator[tuple[GraphModule, Sequence[Tensor | None], str]]:
        for function, example in functions:
            graph = lowered(function, example)
            parts = split(graph) if _samples(example) <= MOST_SAMPLES else None
            for name, part in [("", graph)] if parts is None else parts.named_children():
                assert isinstance(part, GraphModule)
                yield part, _example_of(part, _first(example).device), name

    compile_missing(pieces())


def _first(example: Sequence[Tensor | None]) -> Tensor:
    return next(x for x in example if x is not None)


def _samples(example: Sequence[Tensor | None]) -> int:
    first = _first(example)
    return len(first) if first.dim() else 1


def ahead_of_time(graph: GraphModule, example: Sequence[Tensor | None], part: str = "") -> Callable[..., Any]:
    """The graph as AOTInductor's code; where that fails by `torch.compile`, which keeps nothing for the next run.

    Args:
        part: see `package.build.compiled`.
    """
    try:
        package = compiled(graph, example, part)
    except UserError as error:
        _LOG.warning("%s; torch.compile takes its place", error.message)
        return by_inductor(graph)
    several = isinstance(graph.graph.output_node().args[0], list | tuple)
    return package if several else lambda *arguments: package(*arguments)[0]


def _example_of(part: GraphModule, device: torch.device) -> list[Tensor | None]:
    """Arguments of a part of a graph; only their forms count."""
    forms = [node.meta.get("val") for node in part.graph.find_nodes(op="placeholder")]
    return [
        None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in forms
    ]


def by_inductor(graph: nn.Module) -> Function:
    """A graph as inductor's kernels; they are compiled in the first call.

    Raises:
        UserError: in the first call, where inductor or one of the compilers that it calls fails.
    """
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, which takes a second

    function = torch.compile(graph, fullgraph=True, dynamic=False)

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        try:
            return function(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"torch.compile failed: {reason}; run without --compile, or with --compile=try") from error

    return run
