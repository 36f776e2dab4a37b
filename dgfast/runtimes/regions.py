"""Regional compilation: the cheap operations between two expensive ones become one kernel, compiled once a kind.

Convolutions, matrix products and attention are library calls that no compiler improves; what can be fused lies between
them, and a U-Net repeats it block after block. So the graph is cut at the library calls into regions, equal regions are
compiled once, and the compiled function is called wherever the region stood.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.passes.tools_common import legalize_graph

from dgfast.runtimes.group_norm import DECOMPOSITIONS

aten = torch.ops.aten

_METADATA = {
    aten.view, aten.reshape, aten._unsafe_view, aten.transpose, aten.permute, aten.t, aten.expand, aten.unsqueeze,
    aten.squeeze, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.unbind, aten.alias,
}  # fmt: skip
_FUSIBLE = _METADATA | {
    aten.native_group_norm, aten.native_group_norm_backward, aten.native_layer_norm, aten.silu, aten.silu_backward,
    aten.gelu, aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.sigmoid, aten._to_copy, aten.clone, aten.cat,
    aten.stack, aten.avg_pool2d, aten.avg_pool2d_backward, aten.upsample_nearest2d,
}  # fmt: skip
_WORTHWHILE = 0.01
"""A kind of region is compiled if it keeps this share of what all of them would out of memory; each costs seconds."""


Region = tuple[GraphModule, list[Any]]
"""A region as a graph of its own, and examples of its inputs."""

CompileRegions = Callable[[dict[str, Callable[[], Region]]], dict[str, Callable[..., Any]]]


def fuse(graph: GraphModule, compile_regions: CompileRegions) -> int:
    """Replace the regions of a lowered graph that are worth it by calls of compiled functions, in place.

    Args:
        compile_regions: makes a callable of every region that it is given: of its kind, which is a text that equal
            regions share, and a function that cuts it out.

    Returns:
        the number of kinds that were replaced.
    """
    kinds: dict[str, list[list[Node]]] = defaultdict(list)
    for nodes in _regions(graph.graph):
        kinds[_kind(nodes)].append(nodes)
    saved = {kind: len(alike) * _saved_bytes(alike[0]) for kind, alike in kinds.items()}
    worthwhile = [kind for kind, size in saved.items() if size and size >= _WORTHWHILE * sum(saved.values())]
    compiled = compile_regions({kind: partial(_extract, kinds[kind][0]) for kind in worthwhile})
    for i, kind in enumerate(worthwhile):
        graph.add_submodule(f"region_{i}", _Region(compiled[kind]))
        for nodes in kinds[kind]:
            _replace(graph.graph, f"region_{i}", nodes)
    legalize_graph(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(worthwhile)


def _regions(graph: Graph) -> Iterable[list[Node]]:
    """Connected fusible operations with equally many expensive operations before them.

    That number never falls along a path and rises across an expensive operation, so no path leaves a region and comes
    back to it: each can run in one piece.
    """
    depth: dict[Node, int] = {}
    member: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        depth[node] = max((depth[n] + (n.op == "call_function" and not _fusible(n)) for n in inputs), default=0)
        if not _fusible(node):
            continue
        region = [node]
        for other in {id(member[n]): member[n] for n in inputs if n in member and depth[n] == depth[node]}.values():
            region = other + region
        for n in region:
            member[n] = region
    order = {node: i for i, node in enumerate(graph.nodes)}
    for region in {id(r): r for r in member.values()}.values():
        yield sorted(region, key=order.__getitem__)


def _fusible(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _fusible(node.args[0])  # type: ignore[arg-type]
    return getattr(node.target, "overloadpacket", None) in _FUSIBLE


def _boundary(nodes: list[Node]) -> tuple[list[Node], list[Node]]:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return list(inputs), outputs


def _kind(nodes: list[Node]) -> str:
    """A text that two regions share if one compiled function serves both."""
    inputs, outputs = _boundary(nodes)
    names: dict[Node, str] = {}
    lines = []
    for node in inputs:
        value = node.meta["val"]
        names[node] = f"i{len(names)}"
        lines.append(f"{names[node]}: {value.dtype} {tuple(value.shape)} {tuple(value.stride())}")
    for node in nodes:
        names[node] = f"n{len(names)}"
        lines.append(f"{names[node]} = {node.target} {map_arg((node.args, dict(node.kwargs)), names.__getitem__)!r}")
    return "\n".join([*lines, *(names[node] for node in outputs)])


def _saved_bytes(nodes: list[Node]) -> int:
    """Bytes of the intermediate results that a fused region neither writes nor reads again."""
    kept = set(_boundary(nodes)[1])
    total = 0
    for node in nodes:
        value = node.meta.get("val")
        source = node.args[0] if node.target is operator.getitem else node
        moves = getattr(source.target, "overloadpacket", None) not in _METADATA  # type: ignore[operator, union-attr]
        if isinstance(value, Tensor) and node not in kept and moves:
            total += 2 * value.numel() * value.element_size()
    return total


def _extract(nodes: list[Node]) -> Region:
    """The region as a graph of its own, group normalisation in its fusible form, and examples of its inputs."""
    inputs, outputs = _boundary(nodes)
    example = [node.meta["val"] for node in inputs]
    graph = Graph()
    env: dict[Node, Node] = {}
    for i, node in enumerate(inputs):
        env[node] = graph.placeholder(f"x{i}")
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    region = GraphModule({}, graph)
    with torch.no_grad():
        traced = make_fx(region, decomposition_table=DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)(
            *example
        )
    results = traced.graph.output_node()
    with traced.graph.inserting_before(results):
        results.args = (tuple(_laid_out(traced.graph, *pair) for pair in zip(results.args[0], outputs, strict=True)),)  # type: ignore[arg-type]
    traced.recompile()
    return traced, example


def _laid_out(graph: Graph, fused: Node, original: Node) -> Node:
    """The fused result with the strides of the original; they may differ where a size of 1 leaves them open."""
    found, wanted = fused.meta["val"], original.meta["val"]
    if found.stride() == wanted.stride():
        return fused
    pairs = zip(found.shape, found.stride(), wanted.stride(), strict=True)
    assert all(size == 1 or a == b for size, a, b in pairs), f"{original.target} changes its layout when fused"
    node = graph.call_function(aten.as_strided.default, (fused, list(wanted.shape), list(wanted.stride())))
    node.meta["val"] = wanted
    return node


class _Region(nn.Module):
    """A compiled function under a name that a graph can call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


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
