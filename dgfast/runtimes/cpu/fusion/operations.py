"""What generated code can compute, operation by operation, and C's expressions for it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dgfast.runtimes.cpu.fusion.layout import DTYPES, Space, roles, space, strides

aten = torch.ops.aten

VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.transpose, aten.permute, aten.t, aten.unsqueeze, aten.squeeze,
    aten.alias, aten.expand, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.unbind,
}  # fmt: skip
"""Other names for the same memory."""

POINTWISE: dict[Any, Callable[..., str]] = {
    aten.add: "({} + {})".format,
    aten.sub: "({} - {})".format,
    aten.mul: "({} * {})".format,
    aten.div: "({} / {})".format,
    aten.neg: "(-{})".format,
    aten.sigmoid: "sigmoid({})".format,
    aten.silu: "silu({})".format,
    aten.silu_backward: "silu_backward({}, {})".format,
    aten.gelu: "gelu_tanh({})".format,
    aten.clone: "{}".format,
    aten._to_copy: "{}".format,
}
EXPENSIVE = {aten.sigmoid, aten.silu, aten.silu_backward, aten.gelu}
"""Not to be computed twice."""

NORMS = {aten.native_group_norm, aten.native_group_norm_backward}
RESAMPLING = {aten.avg_pool2d, aten.avg_pool2d_backward, aten.upsample_nearest2d}
_HALVING = [[2, 2], [2, 2], [0, 0], False, True, None]
_HARMLESS = {"memory_format", "dtype", "layout", "device", "pin_memory", "non_blocking"}  # what the result shows itself


def packet(node: Node) -> Any:
    """The operation without its overload; None for what is none."""
    return getattr(node.target, "overloadpacket", None)


def is_view(node: Node) -> bool:
    return packet(node) in VIEWS


def is_backward(norm: Node) -> bool:
    return packet(norm) is aten.native_group_norm_backward


def images(node: Node) -> list[Node]:
    """The operands of a norm, of a resampling or a concatenation that are read pixel by pixel."""
    if packet(node) is aten.cat:
        return list(node.args[0])  # type: ignore[arg-type]
    return list(node.args[: 2 if is_backward(node) else 1])  # type: ignore[arg-type]


def result(node: Node) -> Tensor:
    """The first result, as a tensor without values."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    assert isinstance(first, Tensor)
    return first


def expressible(graph: Graph, batch: int) -> set[Node]:
    """The operations that generated code can compute, given how their operands lie in memory."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and "val" in node.meta and _is_expressible(node, batch, found):
            found.add(node)
    return found


def _is_expressible(node: Node, batch: int, known: set[Node]) -> bool:
    kind = packet(node)
    if node.target is operator.getitem:
        source, index = node.args
        return isinstance(source, Node) and source in known and bool(index == 0 or not is_backward(source))
    value = node.meta["val"][0] if kind in NORMS else node.meta["val"]
    own = space(value, batch) if isinstance(value, Tensor) else None
    if own is None:
        return False
    if kind in VIEWS:
        return space(result(node.args[0]), batch) == own  # type: ignore[arg-type]
    if kind in NORMS:
        weights = node.args[4:5] if is_backward(node) else node.args[1:3]
        vectors = [*weights, *(node.args[2:4] if is_backward(node) else ())]
        return (
            all(space(result(a), batch) == own for a in images(node))
            and all(_is_packed(a) for a in vectors)
            and not any(a in known for a in weights)
        )
    if kind is aten.cat:
        return _concatenates_channels(node, own, batch)
    if kind in RESAMPLING:
        return _is_by_two(node, batch)
    return kind in POINTWISE and _is_elementwise(node, own, batch, known)


def _is_packed(vector: Any) -> bool:
    return vector is None or (vector.meta["val"].is_contiguous() and vector.meta["val"].dtype in DTYPES)


def _concatenates_channels(node: Node, own: Space, batch: int) -> bool:
    parts = [space(result(a), batch) for a in images(node)]
    named = roles(node.meta["val"], batch)
    dim = node.args[1] if len(node.args) > 1 else 0
    return (
        named is not None
        and named[dim] == "c"  # type: ignore[index]
        and all(part is not None and part.pixels == own.pixels for part in parts)
    )


def _is_by_two(node: Node, batch: int) -> bool:
    """2 x 2 pixels to one, or one to 2 x 2, of images whose sides are even."""
    kind, value, source = packet(node), result(node), result(images(node)[0])
    small, large = (value, source) if kind is aten.avg_pool2d else (source, value)
    if value.dim() != 4 or space(source, batch) is None or large.shape[2:] != tuple(2 * n for n in small.shape[2:]):
        return False
    if kind is aten.upsample_nearest2d:
        return True
    options: list[Any] = [list(a) if isinstance(a, list | tuple) else a for a in node.args[1:]]
    options = options[1:] if kind is aten.avg_pool2d_backward else options  # it has the image that was pooled first
    options += _HALVING[len(options) :]
    return [options[0], options[1] or [2, 2], *options[2:]] == _HALVING


def _is_elementwise(node: Node, own: Space, batch: int, known: set[Node]) -> bool:
    options = {k: v for k, v in node.kwargs.items() if k not in _HARMLESS}
    if packet(node) is aten.gelu and options.pop("approximate", "none") != "tanh":
        return False
    if options:
        return False
    for operand in node.args:
        if isinstance(operand, Node):
            value = operand.meta["val"]
            read = (
                strides(value, node.meta["val"], batch) if isinstance(value, Tensor) and value.dtype in DTYPES else None
            )
            if read is None or read.channel > 1:
                return False
            if operand in known and not _is_repeated(space(value, batch), own, read.channel):
                return False
        elif not isinstance(operand, int | float):
            return False
    return True


def _is_repeated(operand: Space | None, own: Space, channel_stride: int) -> bool:
    """Whether what is computed beside it is an image of the same size, or a vector for all its pixels."""
    same = operand is not None and operand.channels == own.channels and channel_stride == 1
    return same and operand is not None and operand.pixels in (1, own.pixels)
