"""A traced graph as inference operations, which every runtime knows and none has to differentiate.

What remains of the backward pass is rewritten in terms of forward operations (a convolution's input gradient is a
convolution), and whatever depends on weights alone is computed here, once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from dgfast.errors import UserError
from dgfast.graph.nodes import constant, drop_identities
from dgfast.graph.trace import without_collecting

aten = torch.ops.aten


def lower(
    graph: GraphModule,
    example: Sequence[Tensor | None],
    channels_last: bool = False,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> GraphModule:
    """`graph` with its backward operations expressed by forward ones and all that depends on weights alone folded.

    Args:
        channels_last: lay images out as [B, H, W, C] in memory from the first convolution on.
        decompositions: further operations to be expressed by simpler ones.
    """
    lowered = unfolded(graph, example, channels_last, decompositions)
    fold_constants(lowered)
    return lowered


def unfolded(
    graph: GraphModule,
    example: Sequence[Tensor | None],
    channels_last: bool = False,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> GraphModule:
    """As `lower`, with what depends on weights alone still to be computed: `fold_constants` does."""
    with torch.no_grad(), without_collecting():
        functional = functionalize(_Lowering(graph, channels_last).run, remove="mutations")
        record = make_fx(functional, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
        lowered = record(*example)
    drop_identities(lowered)
    return lowered


def fold_constants(graph: GraphModule) -> None:
    """Compute every operation that depends on weights alone, in place, and keep its result as a buffer."""
    constants: dict[Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            constants[node] = constant(graph, node)
        elif node.op == "call_function" and not _is_mutable(node) and all(n in constants for n in node.all_input_nodes):
            arguments, keywords = (map_arg(a, constants.__getitem__) for a in (node.args, node.kwargs))
            with torch.no_grad():
                constants[node] = node.target(*arguments, **keywords)
    for node in list(graph.graph.nodes):
        value = constants.get(node)
        is_used = any(user not in constants for user in node.users)
        if node.op == "call_function" and isinstance(value, Tensor) and is_used:
            _attach(graph, node, value)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _attach(graph: GraphModule, node: Node, value: Tensor) -> Node:
    """Replace `node` by the constant `value`, and return the new node."""
    name = f"_folded_{sum(1 for _ in graph.buffers())}"
    graph.register_buffer(name, value.detach(), persistent=False)
    with graph.graph.inserting_before(node):
        new = graph.graph.get_attr(name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    return new


class _Lowering(Interpreter):
    """Runs a graph while another trace watches: what it calls instead of the recorded operations is recorded anew."""

    def __init__(self, graph: GraphModule, channels_last: bool) -> None:
        super().__init__(graph)
        self.channels_last = channels_last

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.convolution.default:
            return self._convolution(*args)
        if target is aten.convolution_backward.default:
            return self._convolution_input_gradient(*args), None, None
        if target is aten.native_group_norm.default:
            x, *rest = args
            y, mean, rstd = target(_dense(x), *rest)
            return y.reshape(x.shape), mean, rstd
        if target is aten.native_group_norm_backward.default:
            grad, x, *rest = args
            dense = _dense(x)
            dx, *nothing = target(_like(grad.reshape(dense.shape), dense), dense, *rest)
            return dx.reshape(x.shape), *nothing
        if target is aten.upsample_nearest2d_backward.default:
            return _blocks_summed(args[0], args[2]) if _is_whole(args[1], args[2]) else target(*args)
        if target in (aten.view.default, aten._unsafe_view.default):
            return aten.reshape.default(*args)  # a view of the layout that was traced may be a copy in another
        if target is aten._safe_softmax.default:
            return aten._softmax.default(args[0], args[1], False)  # no row is masked out entirely: none is masked
        return super().call_function(target, args, kwargs)

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
        dilation: list[int], transposed: bool, output_padding: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        if self.channels_last and x.dim() == 3 and not transposed:  # a 2-D one of height 1: that has a fast layout
            image = self._convolution(
                x.unsqueeze(2), weight.unsqueeze(2), bias, [1, *stride], [0, *padding], [1, *dilation],
                False, [0, *output_padding], groups,
            )  # fmt: skip
            return image.squeeze(2)
        if self.channels_last and x.dim() == 4:
            x, weight = _channels_last(x), _channels_last(weight)
        return aten.convolution.default(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)

    def _convolution_input_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, _: Any, stride: list[int], padding: list[int],
        dilation: list[int], transposed: bool, output_padding: list[int], groups: int, mask: list[bool],
    ) -> Tensor:  # fmt: skip
        """Stride 1: the convolution with the kernel turned by 180 degrees and its channels swapped; else transposed."""
        if mask != [True, False, False]:
            raise UserError("a network's weights require gradients: freeze it with net.requires_grad_(False)")
        dims, size = weight.dim() - 2, weight.shape[2:]
        if transposed:
            image = self._convolution(grad, weight, None, stride, padding, dilation, False, [0] * dims, groups)
            for dim in range(2, 2 + dims):  # output padding of a stride or more makes it see pixels that x has not
                image = image.narrow(dim, 0, x.shape[dim])
            return image
        reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        if all(s == 1 for s in stride) and groups == 1:
            turned = weight.flip(*range(2, weight.dim())).transpose(0, 1).contiguous()
            inner = [r - p for r, p in zip(reach, padding, strict=True)]
            if min(inner) >= 0:
                return self._convolution(grad, turned, None, stride, inner, dilation, False, [0] * dims, 1)
        extra = [
            i - ((o - 1) * s - 2 * p + r + 1)
            for i, o, s, p, r in zip(x.shape[2:], grad.shape[2:], stride, padding, reach, strict=True)
        ]
        return self._convolution(grad, weight, None, stride, padding, dilation, True, extra, groups)


def _is_whole(large: Sequence[int], small: Sequence[int]) -> bool:
    """Whether images of the one size have a whole number of pixels for each of the other's."""
    return all(a % b == 0 for a, b in zip(large, small[2:], strict=True))


def _blocks_summed(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sums [B, C, *size] over blocks of pixels: the input gradient of repeating each pixel."""
    block = [a // b for a, b in zip(grad.shape[2:], size[2:], strict=True)]
    return aten.avg_pool2d.default(grad, block) * math.prod(block)


def _channels_last(x: Tensor) -> Tensor:
    """x [B, C, H, W] with strides that say so even where a size of 1 leaves them open: libraries guess differently."""
    _, c, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    strides = (h * w * c, 1, w * c, c)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _dense(x: Tensor) -> Tensor:
    """x as the normalisation's kernels take it: contiguous, or with the channels last in memory.

    A sequence [B, C, L] that was flattened out of a channels-last image counts as an image of height 1.
    """
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return x.unsqueeze(2)
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in the memory format of `other`."""
    channels_last = other.dim() == 4 and other.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _is_mutable(node: Node) -> bool:
    """Whether it writes to an argument, or is written to."""

    def writes(node: Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return schema is not None and schema.is_mutable

    return writes(node) or any(writes(user) and user.args[0] is node for user in node.users)
