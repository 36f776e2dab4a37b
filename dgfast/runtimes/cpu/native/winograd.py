"""3 x 3 convolutions on the CPU with a quarter of the multiplications (Winograd; Lavin and Gray, arXiv 1509.09308).

F(4 x 4, 3 x 3): the 6 x 6 pixels that 4 x 4 results depend on are evaluated, as a polynomial in two variables, at 36
points; so is the kernel. There a convolution is a product for each point, summed over channels: 36 matrix products
instead of 9 for every one of 16 pixels. The results are interpolated from the products.

The points of each variable are 0, +-5/8, +-3/2 and infinity. With the customary +-1 and +-2 a result is off by 2.4e-6
(root mean square, 256 channels), with these by 1.0e-6; a plain sum in float32 is off by 2.2e-7.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from dgfast.graph.nodes import constant, substitute
from dgfast.runtimes.cpu.native import library
from dgfast.runtimes.cpu.native.sources import lanes, source

aten = torch.ops.aten

_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)  # and infinity; winograd.h computes with these, too
_SIDE = 4
_MOST_CHANNELS = 8192
_PLAIN = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, its padding, groups
_TOLERANCE = 1e-4  # of the largest value, when the compiled code is proved

_WORTHWHILE = 8
"""Multiplications a number that is moved, C K / (C + K): with less, moving to the points takes what it saves."""
_LEAST_PIXELS = 256
"""Of a batch. Weights at the points take four times the memory, and all of it is read: too much for few pixels."""
_OWN_BYTES, _SHARED_BYTES = 800_000, 8_000_000
"""Tiles that a core works on stay in its second cache; those that all cores share, in their third."""


def replace(graph: GraphModule) -> None:
    """Replace, in place, the convolutions of a lowered graph that are worth it. Values agree to float32 rounding.

    Raises:
        UserError: there is no C++ compiler, or it fails.
    """
    chosen = [node for node in graph.graph.nodes if _is_worthwhile(graph, node)]
    if not chosen:
        return
    text = source("winograd", MOST_CHANNELS=_MOST_CHANNELS)
    function = library.load([text], lambda _, found: _agrees(found)).get(text)
    if function is None:
        return
    for node in chosen:
        x, weight, bias, *_ = node.args
        substitute(graph, node, Winograd(function, constant(graph, weight), x.meta["val"].shape), (x, bias))
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


class Winograd(nn.Module):
    """A convolution by the compiled function, for images of one size."""

    def __init__(self, function: Any, weight: Tensor, shape: Sequence[int]) -> None:
        """
        Args:
            weight: [filters, channels, 3, 3]. shape: of the images, [B, channels, H, W].
        """
        super().__init__()
        self._function = function
        self._weights = at_points(weight)
        self._samples, self._channels, self._height, self._width = shape
        self._filters = weight.shape[0]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [B, channels, H, W] -> [B, filters, H, W], both float32; the result is channels-last."""
        x = x.contiguous(memory_format=torch.channels_last)
        shape = self._samples, self._filters, self._height, self._width
        out = torch.empty(shape, memory_format=torch.channels_last)
        threads = torch.get_num_threads()
        chunk, shared = self._schedule(threads)
        floats = (chunk * (self._channels + self._filters) + 10 * lanes()) * self._weights.shape[0]
        workspace = torch.empty(floats * (1 if shared else threads))
        sizes = (ctypes.c_long * 6)(self._height, self._width, self._channels, self._filters, chunk, shared)
        tensors = (ctypes.c_void_p * 5)(
            ctypes.addressof(sizes), x.data_ptr(), self._weights.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        self._function(self._samples, threads, workspace.data_ptr(), tensors)
        return out

    def _schedule(self, threads: int) -> tuple[int, bool]:
        """Tiles at a time, and whether all cores work on the same ones: so they do if they had to share the weights."""
        tiles = self._samples * _tiles(self._height, self._width)
        shared = self._weights.numel() * 4 > _OWN_BYTES
        each = len(self._weights) * 4 * (self._channels + self._filters)
        most = max(1, (_SHARED_BYTES if shared else _OWN_BYTES) // each)
        crews = 1 if shared else threads
        turns = -(-tiles // (crews * most))
        return -(-tiles // (crews * turns)), shared


def at_points(weight: Tensor) -> Tensor:
    """The kernels [K, C, 3, 3] at the 36 points, laid out for products.h: [36, panels, C, panel], float32."""
    filters, channels = weight.shape[:2]
    panel = 2 * lanes()
    one = torch.tensor([_kernel_at(i) for i in range(len(_POINTS))] + [[0.0, 0.0, 1.0]], dtype=torch.float64)
    kernels = weight.permute(2, 3, 1, 0).reshape(9, -1).double()
    values = (torch.kron(one, one) @ kernels).float().view(-1, channels, filters)
    values = F.pad(values, (0, -filters % panel)).unflatten(2, (-1, panel))
    return values.permute(0, 2, 1, 3).contiguous()


def _kernel_at(i: int) -> list[float]:
    """What a kernel of three is multiplied by at point i: its powers over its distances from the others."""
    distances = [_POINTS[i] - other for k, other in enumerate(_POINTS) if k != i]
    product = torch.tensor(distances, dtype=torch.float64).prod().item()
    return [_POINTS[i] ** power / product for power in range(3)]


def _tiles(height: int, width: int) -> int:
    return -(-height // _SIDE) * -(-width // _SIDE)


def _is_worthwhile(graph: GraphModule, node: Any) -> bool:
    if node.target is not aten.convolution.default:
        return False
    x, weight, _, *options = node.args
    value = x.meta["val"]
    if weight.op != "get_attr" or value.dim() != 4 or value.dtype != torch.float32:
        return False
    filters, channels, *kernel = constant(graph, weight).shape
    samples, _, height, width = value.shape
    return (
        kernel == [3, 3]
        and [list(o) if isinstance(o, list | tuple) else o for o in options] == list(_PLAIN)
        and not (channels % lanes() or filters % lanes() or channels > _MOST_CHANNELS)
        and channels * filters >= _WORTHWHILE * (channels + filters)
        and samples * height * width >= max(_LEAST_PIXELS, 8 * samples * _tiles(height, width))
    )


def _agrees(function: Any) -> bool:
    """Whether the compiled function convolves, on random numbers: with cores apart and together, sides not of four."""
    generator = torch.Generator().manual_seed(0)
    for samples, channels, filters, height, width in ((5, 2, 3, 7, 9), (2, 5, 4, 8, 12), (1, 8, 8, 5, 4)):
        weight = torch.randn(filters * lanes(), channels * lanes(), 3, 3, generator=generator)
        bias = torch.randn(filters * lanes(), generator=generator)
        x = torch.randn(samples, channels * lanes(), height, width, generator=generator)
        reference = F.conv2d(x, weight, bias, padding=1)
        difference = Winograd(function, weight, x.shape)(x, bias) - reference
        if not difference.abs().max() <= _TOLERANCE * reference.abs().max():
            return False
    return True
