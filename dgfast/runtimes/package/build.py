"""A pure function compiled ahead of time: traced once with its gradient, lowered, and given to AOTInductor.

What is compiled is kept across runs, in the folder of `cache_folder`, under the name of the graph (see `graph.cache`).
It is code alone: weights are those of the graph, which the code reads where they lie.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.graph.cache import NAME, lowered
from dgfast.graph.cache_folder import cache_folder, unwritable
from dgfast.runtimes.cpu.native import library
from dgfast.runtimes.package.beside import compile_all
from dgfast.runtimes.package.file import Package, write


def require(device: torch.device) -> None:
    """
    Raises:
        UserError: there is no C++ compiler.
    """
    library.compiler()


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` traced with its input gradient, lowered and compiled for the shapes of `example`.

    Values agree with `function` to float32 rounding. Weights are copied: those of the networks stay as they are.

    Raises:
        UserError: the network does not trace, or a compiler fails or is missing.
    """
    return compiled(lowered(function, example), example)


def prepare(functions: Sequence[tuple[Function, Sequence[Tensor | None]]]) -> None:
    """Compile what `build` will ask for and no earlier run has kept, side by side."""
    compile_missing((lowered(function, example), example, "") for function, example in functions)


def compile_missing(graphs: Iterable[tuple[GraphModule, Sequence[Tensor | None], str]]) -> None:
    """The same of lowered graphs; each with its example, and the part that it is, see `compiled`."""
    placed = [(graph, example, path) for graph, example, part in graphs if (path := kept_at(graph, part)) is not None]
    missing = {path: (graph, example, path) for graph, example, path in placed if not path.exists()}
    if len(missing) > 1:
        with suppress(OSError):  # said when they are built
            compile_all(list(missing.values()))


def kept_at(graph: GraphModule, part: str) -> Path | None:
    """The file of what is compiled of a graph; None if it has no name."""
    name = graph.meta.get(NAME)
    return None if name is None else cache_folder("packages") / f"{name}{part}.pt2"


def compiled(graph: GraphModule, example: Sequence[Tensor | None], part: str = "") -> Package:
    """A lowered graph compiled, or the code that an earlier run has kept.

    Args:
        part: which part of the named graph it is; "": all of it.

    Raises:
        UserError: a compiler fails, or the folder cannot be written to.
    """
    device, path = next(x.device for x in example if x is not None), kept_at(graph, part)
    if path is None:
        with TemporaryDirectory() as folder:  # loaded code outlives its file
            return _compiled(graph, example, Path(folder, "function.pt2"), device)
    try:
        return Package(path, device, graph)
    except UserError:  # not there, or damaged
        return _compiled(graph, example, path, device)


def _compiled(graph: GraphModule, example: Sequence[Tensor | None], path: Path, device: torch.device) -> Package:
    try:
        write(graph, example, path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return Package(path, device, graph)
