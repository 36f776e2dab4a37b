"""Convolutions of a lowered graph as oneDNN calls, their weights laid out for this processor once, not every call."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.runtimes.graph import constant

aten = torch.ops.aten


def available() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def pack(graph: GraphModule) -> None:
    """Replace, in place, every 2-D convolution with constant float32 weights. The values stay what they are."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.convolution.default:
            continue
        x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        value: Tensor = node.meta["val"]
        if transposed or weight.op != "get_attr" or value.dim() != 4 or value.dtype != torch.float32:
            continue
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            constant(graph, weight), padding, stride, dilation, groups, list(x.meta["val"].shape)
        )
        name = f"_packed_{node.name}"
        setattr(graph, name, packed)  # an opaque tensor: no buffer could hold it
        with graph.graph.inserting_before(node):
            laid_out = graph.graph.create_node("get_attr", name)
            call = graph.graph.call_function(
                torch.ops.mkldnn._convolution_pointwise.default,
                (x, laid_out, bias, padding, stride, dilation, groups, "none", [], ""),
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
