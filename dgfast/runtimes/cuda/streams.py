"""Networks that do not wait for one another run beside one another: a stream each, on CUDA.

The score network and the discriminator both read the noisy image, and only their results meet. At a small batch neither
fills the chip. Captured in a CUDA graph, the streams become branches of the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.passes.split_module import split_module

from dgfast.graph import Function
from dgfast.graph.cache import NAME
from dgfast.graph.nodes import constant

aten = torch.ops.aten

Compile = Callable[[nn.Module, str], Callable[..., Any]]
"""(a part, its name, "" if it is the whole) -> a faster function that returns the same."""

MOST_SAMPLES = 32
"""Up to this batch networks get streams: with 32 samples, 512 channels of 8 x 8 pixels are 64 tiles of 128 x 128 in a
product, and an H200 has 132 multiprocessors. Not measured yet: `python benchmarks/gpu.py` compares both."""

_HEAVY = {
    aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_backward, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_cudnn_attention_backward, aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip
_FIRST, _LAST = "first", "last"


def split(graph: GraphModule) -> GraphModule | None:
    """The graph in parts: what all branches read, each branch, and what reads several; None if it has one branch.

    A branch is what heavy operations connect: convolutions, matrix products, attention. Parts are submodules.
    """
    branch = _branches(graph.graph)
    if len(set(branch.values()) - {_FIRST, _LAST}) < 2:
        return None
    parts = split_module(graph, graph, branch.__getitem__)  # type: ignore[arg-type]
    parts.meta[NAME] = graph.meta.get(NAME)
    for call in parts.graph.find_nodes(op="call_module"):
        _move_weights(parts, call)
    parts.graph.eliminate_dead_code()
    parts.recompile()
    return parts


class Concurrent:
    """The parts of a split graph, each branch but one on a stream of its own."""

    def __init__(self, parts: GraphModule, compile: Compile) -> None:
        """
        Args:
            parts: of `split`. compile: makes a faster callable of each.
        """
        branches = [name for name, _ in parts.named_children() if not name.endswith((_FIRST, _LAST))]
        self._streams = {name: torch.cuda.Stream() for name in branches[1:]}
        self._parts = {name: compile(part, name) for name, part in parts.named_children()}
        self._graph = parts

    def __call__(self, *arguments: Any) -> Any:
        self._forked = False
        # Nothing is freed before the end: memory that one stream still reads must not be given to another.
        results = _Runner(self._graph, garbage_collect_values=False).through(self._call, arguments)
        self._wait()
        return results

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        if name.endswith((_FIRST, _LAST)):
            if name.endswith(_LAST):
                self._wait()
            self._forked = False
            return self._parts[name](*arguments)
        if not self._forked:  # before the first branch, which goes on in this stream: none must wait for another
            for stream in self._streams.values():
                stream.wait_stream(torch.cuda.current_stream())
            self._forked = True
        with torch.cuda.stream(self._streams.get(name)):
            return self._parts[name](*arguments)

    def _wait(self) -> None:
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)


class _Runner(Interpreter):
    """Runs the graph of parts, calling each through a function of its name."""

    def through(self, call: Callable[[str, Sequence[Any]], Any], arguments: Sequence[Any]) -> Any:
        self._through = call
        return self.run(*arguments)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._through(target, args)


def concurrent(graph: GraphModule, compile: Compile) -> Function:
    """The graph compiled: in parts, its networks beside one another, if it has several."""
    parts = split(graph)
    return compile(graph, "") if parts is None else Concurrent(parts, compile)


def _move_weights(parts: GraphModule, call: Node) -> None:
    """Into the part that reads them: `split_module` leaves them outside and hands them over in every call."""
    part = parts.get_submodule(str(call.target))
    assert isinstance(part, GraphModule)
    part.meta[NAME] = parts.meta[NAME]
    kept = []
    for outside, inside in zip(call.args, part.graph.find_nodes(op="placeholder"), strict=True):
        if isinstance(outside, Node) and outside.op == "get_attr":
            part.register_buffer(inside.name, constant(parts, outside), persistent=False)
            with part.graph.inserting_before(inside):
                inside.replace_all_uses_with(part.graph.get_attr(inside.name))
            part.graph.erase_node(inside)
        else:
            kept.append(outside)
    call.args = tuple(kept)
    part.recompile()


def _branches(graph: Graph) -> dict[Node, str]:
    """The part of each node: by the heavy operations that it depends on, and which of them meet in another one."""
    joined: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while node in joined:
            node = joined[node]
        return node

    above: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        heavy_roots = {root(heavy) for source in node.all_input_nodes for heavy in above[source]}
        if getattr(node.target, "overloadpacket", None) in _HEAVY:
            for other in heavy_roots:
                joined[other] = node
            heavy_roots = {node}
        above[node] = heavy_roots
    names: dict[Node, str] = {}
    parts: dict[Node, str] = {}
    for node, heavy in above.items():
        roots = {root(h) for h in heavy}
        if len(roots) == 1:
            parts[node] = names.setdefault(roots.pop(), f"branch{len(names)}")
        else:
            parts[node] = _LAST if roots else _FIRST
    return parts
