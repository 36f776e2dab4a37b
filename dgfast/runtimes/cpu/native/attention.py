"""Attention and its input gradient on the CPU, every head in a core's cache.

PyTorch's fused kernels call a library for many small matrix products, which costs more than the products where tokens
are few. These have them inline. The scores of a block of queries against all keys are kept, so nothing is rescaled.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dgfast.graph.nodes import substitute
from dgfast.runtimes.cpu.native import library
from dgfast.runtimes.cpu.native.sources import lanes, source

aten = torch.ops.aten

_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_KINDS = {_FORWARD: ("attention_forward", 3), _BACKWARD: ("attention_backward", 6)}
"""The file of each, and how many tensors it reads: q, k, v, of a gradient also its own before and the results after."""
_QUERIES = 56  # of a block: four blocks of rows
_SCORES = 1 << 16  # floats that a block of scores has at most, for the second cache's sake
_MOST_KEYS = 1 << 14
_TOLERANCE = 1e-4  # of the largest value, when the compiled code is proved


def replace(graph: GraphModule) -> None:
    """Replace, in place, every attention of a lowered graph that the code here can do. Values agree to rounding.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    chosen = [node for node in graph.graph.nodes if node.target in _KINDS and _is_plain(node)]
    targets = {_text(target): target for target in {node.target: None for node in chosen}}
    functions = library.load(list(targets), lambda text, function: _agrees(targets[text], function))
    for node in chosen:
        function = functions.get(_text(node.target))
        if function is not None:
            module = Attention(function, node.target, node.meta["val"], _scale(node))
            substitute(graph, node, module, node.args[: _KINDS[node.target][1]])
    graph.recompile()


class Attention(nn.Module):
    """A compiled function, forward or backward, for results of one size and layout."""

    def __init__(self, function: Any, target: Any, results: Sequence[Tensor], scale: float) -> None:
        super().__init__()
        self._function, self._backward = function, target is _BACKWARD
        self._results = [(tuple(x.shape), tuple(x.stride())) for x in results]
        self._scale = ctypes.c_float(scale)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """q [B, heads, queries, depth], k and v [B, heads, keys, depth] -> result, logsumexp [B, heads, queries];
        or gradient, q, k, v, result, logsumexp -> the gradients of q, k and v."""
        tensors = tuple(x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous() for x in tensors)
        q, k = tensors[1:3] if self._backward else tensors[:2]
        results = [torch.empty_strided(*layout) for layout in self._results]
        (batch, heads, queries, depth), keys, threads = q.shape, k.shape[2], torch.get_num_threads()
        rows = min(queries, _QUERIES, max(1, _SCORES // keys))
        steps = [step for x in (*tensors, *results) for step in x.stride()[:3]]
        sizes = (ctypes.c_long * (5 + len(steps)))(heads, queries, keys, depth, rows, *steps)
        addresses = [x.data_ptr() for x in (*tensors, *results)]
        pointers = (ctypes.c_void_p * (2 + len(addresses)))(
            ctypes.addressof(sizes), ctypes.addressof(self._scale), *addresses
        )
        workspace = torch.empty(threads * self._floats(rows, keys, depth))
        self._function(batch, threads, workspace.data_ptr(), pointers)
        return tuple(results)

    def _get_name(self) -> str:
        return "AttentionGradient" if self._backward else "Attention"

    def _floats(self, rows: int, keys: int, depth: int) -> int:
        """What a core needs beside the tensors, counted as the code does."""
        panel = 2 * lanes()
        wide, deep = keys + -keys % panel, depth + -depth % panel
        scores = rows * (wide + lanes())
        if self._backward:
            return 2 * depth * wide + 3 * keys * deep + 3 * rows * deep + 2 * scores
        return depth * wide + keys * deep + rows * deep + scores


def _text(target: Any) -> str:
    return source(_KINDS[target][0], "attention", MOST_QUERIES=_QUERIES)


def _agrees(target: Any, function: Any) -> bool:
    """Whether the compiled function computes what PyTorch does, on random numbers."""
    sizes = (2, 3, 70, 70, 24), (1, 2, 5, 65, 64), (3, 1, 64, 33, 40)
    return all(_agrees_on(target, function, *size) for size in sizes)


def _agrees_on(target: Any, function: Any, batch: int, heads: int, queries: int, keys: int, depth: int) -> bool:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    q, k, v, grad = (draw(batch, n, heads, depth).transpose(1, 2) for n in (queries, keys, keys, queries))
    reference, tensors = _FORWARD(q, k, v), (q, k, v)
    if target is _BACKWARD:
        tensors = (grad, q, k, v, *reference)
        reference = _BACKWARD(*tensors, 0.0, False)
    results = Attention(function, target, reference, 1 / math.sqrt(depth))(*tensors)
    return all((a - b).abs().max() <= _TOLERANCE * b.abs().max() for a, b in zip(results, reference, strict=True))


def _is_plain(node: Node) -> bool:
    """Float32, nothing masked or dropped, every token's numbers together; for a gradient, heads for every core."""
    arguments = _named(node)
    q, k, v = (arguments[name].meta["val"] for name in ("query", "key", "value"))
    heads = q.shape[0] * q.shape[1]
    return (
        q.dtype == torch.float32
        and q.shape[-1] == v.shape[-1]
        and k.shape[2] <= _MOST_KEYS
        and all(x.dim() == 3 or x.stride(-1) == 1 for x in node.meta["val"])
        and not (arguments["dropout_p"] or arguments["is_causal"] or arguments["attn_mask"])
        and _scale(node) > 0
        and (node.target is _FORWARD or heads >= torch.get_num_threads())
    )


def _scale(node: Node) -> float:
    arguments = _named(node)
    return float(arguments["scale"] or 1 / math.sqrt(arguments["query"].meta["val"].shape[-1]))


def _named(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {a.name: a.default_value if a.has_default_value() else None for a in node.target._schema.arguments}
    return named | dict(zip(named, node.args, strict=False)) | node.kwargs
