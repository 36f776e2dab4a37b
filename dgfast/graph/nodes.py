"""Reading and changing the nodes of a graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_IDENTITIES = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)


def constant(graph: GraphModule, node: Node) -> Tensor:
    """The tensor that a get_attr node stands for."""
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value.detach()


def copy_constants(graph: GraphModule) -> None:
    """Give the graph tensors of its own, in place: what happens to the networks' is no matter of it any more."""
    copies = dict[int, torch.UntypedStorage]()
    for number, node in enumerate(graph.graph.find_nodes(op="get_attr")):
        held = constant(graph, node)
        memory = held.untyped_storage()
        if memory._cdata not in copies:
            copies[memory._cdata] = memory.clone()
        place = held.storage_offset(), held.shape, held.stride()
        node.target = f"_own_{number}"
        graph.register_buffer(node.target, held.new_empty(0).set_(copies[memory._cdata], *place), persistent=False)
    graph.recompile()


def substitute(graph: GraphModule, node: Node, module: nn.Module, arguments: Sequence[Any]) -> None:
    """Call a module on `arguments` instead of what the node does."""
    name = f"{type(module).__name__.lower()}_{node.name}"
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(name, tuple(arguments))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def drop_identities(graph: GraphModule) -> None:
    """Remove the operations that return their argument."""
    for node in graph.graph.nodes:
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
