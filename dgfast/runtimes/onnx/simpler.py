"""Operations by simpler ones, for what ONNX has no operation for: PyTorch's own decompositions, and these.

A decomposition that returns NotImplemented leaves the operation as it is; the table of operations may have it, or else
the user hears its name.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table
from torch.nn import functional as F

from dgfast.runtimes.onnx.operations import TABLE

aten = torch.ops.aten

_TORCHS = (
    aten.elu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.native_batch_norm.default,
    aten.grid_sampler_2d.default, aten.upsample_bicubic2d.default,
)  # fmt: skip
"""Decompositions that PyTorch has and does not count among those of its core."""
_OWN: dict[Any, Callable[..., Any]] = {}


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """All of them, by operation."""
    core = {target: how for target, how in core_aten_decompositions().items() if target not in TABLE}
    return core | {target: decomposition_table[target] for target in _TORCHS} | _OWN


def _of(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OWN.update(dict.fromkeys(targets, function))
        return function

    return register


# Distances ------------------------------------------------------------------------------------------------------------
@_of(aten._cdist_forward.default)
def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


@_of(aten._cdist_backward.default)
def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor) -> Any:
    """The gradient for the first points; 0 where two coincide."""
    if p not in (1.0, 2.0):
        return NotImplemented
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    if p == 1.0:
        return (grad.unsqueeze(-1) * apart.sign()).sum(-2)
    share = torch.where(distance == 0, 0.0, grad / torch.where(distance == 0, 1.0, distance))
    return (share.unsqueeze(-1) * apart).sum(-2)


# Statistics and steps -------------------------------------------------------------------------------------------------
@_of(aten.var_mean.correction)
def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None else dim
    return aten.var.correction(x, dims, correction=correction, keepdim=keepdim), x.mean(dims, keepdim)


@_of(aten.bucketize.Tensor)
def _bucketize(x: Tensor, bounds: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many bounds lie below each number."""
    passed = bounds <= x.unsqueeze(-1) if right else bounds < x.unsqueeze(-1)
    return passed.sum(-1).to(torch.int32 if out_int32 else torch.int64)


# Products that run on -------------------------------------------------------------------------------------------------
@_of(aten.cumprod.default)
def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """By doubling: after k rounds each is the product of the last 2^k (Hillis and Steele 1986)."""
    x = x if dtype is None else x.to(dtype)
    if not x.dim():
        return x.clone()
    size, reach = x.shape[dim], 1
    while reach < size:
        ones = torch.ones_like(x.narrow(dim, 0, reach))
        x = x * torch.cat([ones, x.narrow(dim, 0, size - reach)], dim)
        reach *= 2
    return x


# Parts of tensors -----------------------------------------------------------------------------------------------------
@_of(aten.diagonal.default)
def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    rows, columns = _on_diagonal(x, offset, dim1, dim2)
    return x.movedim((dim1, dim2), (0, 1))[rows, columns].movedim(0, -1)


@_of(aten.diagonal_scatter.default)
def _diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    places, front = _on_diagonal(x, offset, dim1, dim2), x.movedim((dim1, dim2), (0, 1))
    return front.index_put(places, source.movedim(-1, 0)).movedim((0, 1), (dim1, dim2))


def _on_diagonal(x: Tensor, offset: int, dim1: int, dim2: int) -> tuple[Tensor, Tensor]:
    first, second = max(-offset, 0), max(offset, 0)
    count = torch.arange(max(min(x.shape[dim1] - first, x.shape[dim2] - second), 0), device=x.device)
    return count + first, count + second


@_of(aten.unfold.default)
def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    dim %= x.dim()
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    windows = starts.unsqueeze(1) + torch.arange(size, device=x.device)
    return x.index_select(dim, windows.reshape(-1)).unflatten(dim, windows.shape).movedim(dim + 1, -1)


@_of(aten.slice_scatter.default)
def _slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    dim %= x.dim()
    places = torch.arange(x.shape[dim], device=x.device)[start:end:step]
    if step != 1:
        return aten.index_put.default(x, [*[None] * dim, places], source.expand(_with_size(x, dim, len(places))))
    first = (start or 0) + (x.shape[dim] if (start or 0) < 0 else 0)
    last = first + len(places)
    middle = source.expand(_with_size(x, dim, len(places))).to(x.dtype)
    return torch.cat([x.narrow(dim, 0, first), middle, x.narrow(dim, last, x.shape[dim] - last)], dim)


@_of(aten.slice_backward.default)
def _slice_backward(grad: Tensor, sizes: list[int], dim: int, start: int, end: int, step: int) -> Any:
    if step == 1:
        return NotImplemented
    return aten.slice_scatter.default(grad.new_zeros(sizes), grad, dim, start, end, step)


@_of(aten.copy.default)
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape).clone()


def _with_size(x: Tensor, dim: int, size: int) -> list[int]:
    return [size if i == dim else n for i, n in enumerate(x.shape)]


# Images: maps that are linear in each direction, as matrices ----------------------------------------------------------
@_of(aten.upsample_bilinear2d.default)
def _bilinear(
    x: Tensor, size: list[int], align: bool, scale_h: float | None = None, scale_w: float | None = None
) -> Tensor:
    rows, columns = _interpolation(x, x.shape[-2:], size, align, (scale_h, scale_w))
    return rows @ x @ columns.mT


@_of(aten.upsample_bilinear2d_backward.default)
def _bilinear_backward(
    grad: Tensor, size: list[int], input_size: list[int], align: bool, scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:  # fmt: skip
    rows, columns = _interpolation(grad, input_size[-2:], size, align, (scale_h, scale_w))
    return rows.mT @ grad @ columns


def _interpolation(
    x: Tensor, small: Any, large: Any, align: bool, scales: tuple[float | None, float | None]
) -> list[Tensor]:
    """A matrix for each direction: what becomes of each unit vector."""
    matrices = []
    for before, after, scale in zip(small, large, scales, strict=True):
        eye = torch.eye(before, dtype=x.dtype, device=x.device).unsqueeze(0)
        matrices.append(aten.upsample_linear1d.default(eye, [after], align, scale)[0].mT)
    return matrices


@_of(aten._adaptive_avg_pool2d.default)
def _adaptive(x: Tensor, size: list[int]) -> Any:
    if any(n % m for n, m in zip(x.shape[-2:], size, strict=True)):
        return NotImplemented
    return F.avg_pool2d(x, [n // m for n, m in zip(x.shape[-2:], size, strict=True)])


@_of(aten._adaptive_avg_pool2d_backward.default)
def _adaptive_backward(grad: Tensor, x: Tensor) -> Any:
    sides = list(zip(x.shape[-2:], grad.shape[-2:], strict=True))
    if any(n % m for n, m in sides):
        return NotImplemented
    factors = [n // m for n, m in sides]
    blocks = grad[..., :, None, :, None].expand(*grad.shape[:-1], factors[0], grad.shape[-1], factors[1])
    return blocks.reshape(x.shape) / prod(factors)


@_of(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(
    grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool,
    indices: Tensor,
) -> Tensor:  # fmt: skip
    """Each number added to the pixel that was the largest."""
    return torch.zeros_like(x).flatten(-2).scatter_add(-1, indices.flatten(-2), grad.flatten(-2)).reshape(x.shape)


@_of(aten.replication_pad2d_backward.default, aten.replication_pad1d_backward.default)
def _replication_backward(grad: Tensor, x: Tensor, padding: list[int]) -> Tensor:
    """Each number added to that of the edge which it repeats."""
    for dim, before in zip(range(x.dim() - 1, -1, -1), padding[::2], strict=False):
        places = (torch.arange(grad.shape[dim], device=x.device) - before).clamp(0, x.shape[dim] - 1)
        size = _with_size(grad, dim, x.shape[dim])
        grad = grad.new_zeros(size).index_add(dim, places, grad)
    return grad
