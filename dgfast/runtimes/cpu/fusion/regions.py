"""Fusion on the CPU: the cheap operations between two expensive ones become one function, compiled once a kind.

Convolutions, matrix products and attention are library calls that no compiler improves; what can be fused lies between
them, and a U-Net repeats it block after block. So the graph is cut at the library calls into regions, equal regions are
compiled once, and the compiled function is called wherever the region stood.
"""

import ctypes
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.tools_common import legalize_graph

from dgfast.runtimes.cpu.fusion.operations import expressible, is_view, result
from dgfast.runtimes.cpu.fusion.source import Code, memory, write
from dgfast.runtimes.cpu.native import library

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of the largest value: on random numbers, where the operations one by one round otherwise."""


def fuse(graph: GraphModule, batch: int) -> int:
    """Replace the regions of a lowered graph by calls of compiled functions, in place.

    Args:
        batch: samples in the graph's images.

    Returns:
        the number of different functions.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    regions = [_Cut(nodes, *_boundary(nodes), batch) for nodes in _regions(graph.graph, batch)]
    first = {region.code.text: region for region in reversed(regions)}
    functions = library.load(list(first), lambda text, function: first[text].agrees(function))
    for i, region in enumerate(regions):
        if region.code.text in functions:
            graph.add_submodule(f"region_{i}", region.call(functions[region.code.text]))
            _replace(graph.graph, f"region_{i}", region.nodes)
    legalize_graph(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(functions)


class _Cut:
    """A region of the graph, and its code."""

    def __init__(self, nodes: list[Node], inputs: list[Node], outputs: list[Node], batch: int) -> None:
        self.nodes, self._inputs, self._outputs, self._batch = nodes, inputs, outputs, batch
        self.code = write(nodes, inputs, outputs, batch)

    def call(self, function: Any) -> nn.Module:
        """What calls the compiled function on tensors."""
        return _Region(function, self.code, [memory(result(node)) for node in self._inputs], self._batch)

    def agrees(self, function: Any) -> bool:
        """Whether the compiled function computes what the operations do one by one, on random numbers."""
        generator = torch.Generator().manual_seed(0)
        examples = [_random(result(node), generator) for node in self._inputs]
        values: dict[Node, Any] = dict(zip(self._inputs, examples, strict=True))
        with torch.no_grad():
            for node in self.nodes:
                arguments: Any = map_arg(node.args, values.__getitem__)
                keywords: Any = map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
            return all(map(_close, self.call(function)(*examples), (values[node] for node in self._outputs)))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    return torch.randn(size, generator=generator).to(like.dtype).as_strided(like.shape, like.stride())


def _close(found: Tensor, wanted: Tensor) -> bool:
    difference = (found.float() - wanted.float()).abs().max()
    return bool(difference <= _TOLERANCES[wanted.dtype] * wanted.float().abs().max())


def _regions(graph: Graph, batch: int) -> Iterable[list[Node]]:
    """Connected fusible operations with equally many expensive operations before them.

    That number never falls along a path and rises on each path that leaves a region, so that no path comes back to one:
    each can run in one piece.
    """
    fusible = expressible(graph, batch)
    depth: dict[Node, int] = {}
    member: dict[Node, list[Node]] = {}

    def passed(node: Node) -> int:
        if node.op != "call_function" or node in fusible:
            return 0
        free = is_view(node) or node.target is operator.getitem
        return int(not free or any(n in fusible for n in node.all_input_nodes))

    for node in graph.nodes:
        inputs = node.all_input_nodes
        depth[node] = max((depth[n] + passed(n) for n in inputs), default=0)
        if node not in fusible:
            continue
        region = [node]
        for other in {id(member[n]): member[n] for n in inputs if n in member and depth[n] == depth[node]}.values():
            region = other + region
        for n in region:
            member[n] = region
    order = {node: i for i, node in enumerate(graph.nodes)}
    for region in {id(r): r for r in member.values()}.values():
        if not all(is_view(node) for node in region):
            yield sorted(region, key=order.__getitem__)


def _boundary(nodes: list[Node]) -> tuple[list[Node], list[Node]]:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return list(inputs), outputs


class _Region(nn.Module):
    """A compiled function and what it takes: tensors that lie in memory as its code expects."""

    def __init__(self, function: Any, code: Code, inputs: Sequence[Any], batch: int) -> None:
        super().__init__()
        self._function, self._code, self._inputs, self._batch = function, code, inputs, batch
        self._pointers = ctypes.c_void_p * (len(inputs) + len(code.outputs))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        code = self._code
        laid_out = [_as(x, *layout) for x, layout in zip(inputs, self._inputs, strict=True)]
        outputs = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in code.outputs]
        tensors = [*laid_out, *outputs]
        threads = torch.get_num_threads()
        workspace = torch.empty(threads * code.workspace)
        pointers = self._pointers(*(x.data_ptr() for x in tensors))
        self._function(self._batch, threads, workspace.data_ptr(), pointers)
        return tuple(tensors[i].as_strided(shape, stride) for i, (shape, stride, _) in code.results)


def _as(x: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor with these strides: libraries may lay out their results otherwise than tracing foresees."""
    return x if x.stride() == stride else torch.empty_strided(shape, stride, dtype=dtype).copy_(x)


def _replace(graph: Graph, region: str, nodes: list[Node]) -> None:
    """Call the submodule `region` instead of the region's operations; the graph is put in order afterwards."""
    inputs, outputs = _boundary(nodes)  # afresh: regions replaced before have changed what this one reads
    with graph.inserting_before(nodes[-1]):
        call = graph.call_module(region, tuple(inputs))
        for i, node in enumerate(outputs):
            value = graph.call_function(operator.getitem, (call, i))
            value.meta = dict(node.meta)
            node.replace_all_uses_with(value)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)
