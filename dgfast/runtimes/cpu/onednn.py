"""A lowered graph's convolutions and linear layers as oneDNN calls, weights laid out for this processor once."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dgfast.graph.nodes import constant

aten = torch.ops.aten

_LEAST_PRODUCTS = 1 << 21
"""Multiplications from which a linear layer is oneDNN's: fewer take less time than its call."""


def available() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def pack(graph: GraphModule) -> None:
    """Replace, in place, every 2-D convolution and large linear layer with constant float32 weights.

    The values stay what they are. PyTorch's own linear layers call MKL, which takes AMD's processors for older ones.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.convolution.default:
            _pack_convolution(graph, node)
        elif node.target in (aten.addmm.default, aten.mm.default) and not node.kwargs:
            _pack_linear(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _pack_convolution(graph: GraphModule, node: Any) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    value: Tensor = node.meta["val"]
    if transposed or weight.op != "get_attr" or value.dim() != 4 or value.dtype != torch.float32:
        return
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        constant(graph, weight), padding, stride, dilation, groups, list(x.meta["val"].shape)
    )
    call = torch.ops.mkldnn._convolution_pointwise.default
    _call(graph, node, packed, call, x, (bias, padding, stride, dilation, groups, "none", [], ""))


def _pack_linear(graph: GraphModule, node: Any) -> None:
    *bias, x, weight = node.args
    value: Tensor = node.meta["val"]
    if weight.op != "get_attr" or value.dtype != torch.float32 or (bias and bias[0].meta["val"].dim() != 1):
        return
    matrix = constant(graph, weight).t().contiguous()  # [out, in]
    if len(value) * matrix.numel() < _LEAST_PRODUCTS:
        return
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, len(value))
    call = torch.ops.mkldnn._linear_pointwise.default
    _call(graph, node, packed, call, x, (bias[0] if bias else None, "none", [], ""))


def _call(graph: GraphModule, node: Node, packed: Tensor, target: object, x: Node, options: tuple[object, ...]) -> None:
    """Call `target` on x, the packed weights and its options, instead of what the node does."""
    name = f"_packed_{node.name}"
    setattr(graph, name, packed)  # an opaque tensor: no buffer could hold it
    with graph.graph.inserting_before(node):
        laid_out = graph.graph.create_node("get_attr", name)
        call = graph.graph.call_function(target, (x, laid_out, *options))  # type: ignore[arg-type]
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)
