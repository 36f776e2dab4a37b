"""Group normalisation and its input gradient in generated code, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.fusion import regions
from tests.support.runtimes import aten

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default


def arguments(shape: tuple[int, ...], dtype: torch.dtype, affine: str, mean: float) -> Arguments:
    """x, dy, weight, bias; the channels last in memory."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).to(dtype) for _ in range(2))
    x, dy = (t.to(dtype).movedim(1, -1).contiguous().movedim(-1, 1) for t in (x + mean, dy))
    return x, dy, weight if affine else None, bias if affine == "weight and bias" else None


def normalised(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> tuple[Tensor, ...]:
    """y, mean, 1 / standard deviation, and the gradient for x."""
    pixels = x[0, 0].numel()
    sizes = x.shape[0], x.shape[1], pixels, groups
    y, mean, rstd = forward(x, weight, bias, *sizes, 1e-5)
    return y, mean, rstd, backward(dy, x, mean, rstd, weight, *sizes, [True, False, False])[0]


def fused(inputs: Arguments, groups: int) -> tuple[GraphModule, list[Tensor]]:
    tensors = [t for t in inputs if t is not None]
    missing: list[Any] = [*[None] * (4 - len(tensors)), groups]
    graph = lower(trace(lambda *present: normalised(*present, *missing), tensors), tensors, channels_last=True)
    assert regions.fuse(graph, len(inputs[0])) >= 1
    assert not {forward, backward} & {node.target for node in graph.graph.nodes}
    return graph, tensors


def exact(inputs: Arguments, groups: int) -> tuple[Tensor, ...]:
    x, dy, weight, bias = (None if t is None else t.double().contiguous() for t in inputs)
    assert x is not None and dy is not None
    return normalised(x, dy, weight, bias, groups)


SHAPES = [((2, 6, 5, 3), 2), ((3, 8, 7), 4), ((2, 4, 3, 3), 4), ((1, 12, 4, 4), 1), ((2, 128, 4, 4), 32)]
CASES = [(torch.float32, *shape, affine) for shape in SHAPES for affine in ("", "weight", "weight and bias")]
CASES.append((torch.bfloat16, (2, 8, 4, 4), 2, "weight and bias"))


@pytest.mark.parametrize(("dtype", "shape", "groups", "affine"), CASES, ids=str)
def test_fusion_norms_equal_float64(dtype: torch.dtype, shape: tuple[int, ...], groups: int, affine: str) -> None:
    inputs = arguments(shape, dtype, affine, 0.3)
    graph, tensors = fused(inputs, groups)
    for mine, reference in zip(graph(*tensors), exact(inputs, groups), strict=True):
        assert mine.shape == reference.shape
        tolerance = TOLERANCES[dtype] * float(reference.abs().max())
        torch.testing.assert_close(mine.double(), reference, rtol=0, atol=tolerance)


def test_fusion_norms_survive_a_mean_a_thousand_times_the_spread() -> None:
    """The variance as E[x^2] - E[x]^2 would be off by several per cent here."""
    inputs = arguments((2, 8, 16, 16), torch.float32, "weight and bias", 1e3)
    graph, tensors = fused(inputs, 4)
    tolerances = (1e-3, 1e-6, 1e-5, 1e-3)  # neighbours of 1000 are 6e-5 apart
    for mine, reference, tol in zip(graph(*tensors), exact(inputs, 4), tolerances, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=tol, atol=tol)


def test_fusion_norms_that_stand_side_by_side_keep_their_sums_apart() -> None:
    """Two gradients of one region, each of which sums two numbers a channel in the same loop."""
    x, dy, weight, bias = arguments((2, 8, 5, 3), torch.float32, "weight and bias", 0.3)
    assert weight is not None and bias is not None

    def both(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (normalised(x, dy, weight, bias, 2)[3] + normalised(dy, x, weight, bias, 4)[3],)

    tensors = [x, dy, weight, bias]
    graph = lower(trace(both, tensors), tensors, channels_last=True)
    assert regions.fuse(graph, 2) >= 1 and backward not in {node.target for node in graph.graph.nodes}
    (exactly,) = both(*(tensor.double().contiguous() for tensor in tensors))
    torch.testing.assert_close(graph(*tensors)[0].double(), exactly, rtol=0, atol=1e-5 * float(exactly.abs().max()))
