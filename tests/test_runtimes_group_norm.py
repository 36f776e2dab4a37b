"""Group normalisation in single operations, which fuse, equals torch's own."""

import math

import pytest
import torch
from torch import Tensor

from dgfast.runtimes.group_norm import DECOMPOSITIONS
from tests.support.runtimes import aten, layout

NORM_TOL = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # float64 too is computed in float32


def norm_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, affine: str, order: str, mean: float, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, dy, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).to(weight_dtype) for _ in range(2))
    x, dy = (x + mean).to(dtype), dy.to(dtype)
    if order == "nhwc":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    return x, dy, weight if affine else None, bias if affine == "weight and bias" else None


@pytest.mark.parametrize("order", ["nchw", "nhwc"])
@pytest.mark.parametrize("affine", ["", "weight", "weight and bias"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 3), 2), ((3, 8, 7), 4), ((1, 4, 1, 1), 2), ((2, 4, 3, 3), 4), ((2, 4, 3, 3), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", NORM_TOL, ids=str)
def test_runtimes_group_norm_equals_atens(
    dtype: torch.dtype, shape: tuple[int, ...], groups: int, affine: str, order: str
) -> None:
    x, dy, weight, bias = norm_arguments(shape, dtype, affine, order, 0.3, dtype)
    sizes = shape[0], shape[1], math.prod(shape[2:]), groups
    forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default
    wanted = forward(x.contiguous(), weight, bias, *sizes, 1e-5)
    found = DECOMPOSITIONS[forward](x, weight, bias, *sizes, 1e-5)
    assert layout(found[0]) == layout(x)
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=NORM_TOL[dtype], atol=NORM_TOL[dtype])
    mask = [True, False, False]
    gradient = backward(dy.contiguous(), x.contiguous(), wanted[1], wanted[2], weight, *sizes, mask)[0]
    mine, *nothing = DECOMPOSITIONS[backward](dy, x, wanted[1], wanted[2], weight, *sizes, mask)
    assert mine.dtype == x.dtype and layout(mine) == layout(x) and nothing == [None, None]
    scale = 1 if gradient.numel() == 4 else gradient.abs().max().item()  # of one pixel a channel it is mostly rounding
    torch.testing.assert_close(mine / scale, gradient / scale, rtol=0, atol=NORM_TOL[dtype] * 10)


def test_runtimes_group_norm_of_another_type_than_its_weights_keeps_atens_types() -> None:
    x, _, weight, bias = norm_arguments((2, 8, 4, 4), torch.bfloat16, "weight and bias", "nchw", 0.0, torch.float32)
    forward = aten.native_group_norm.default
    wanted = forward(x, weight, bias, 2, 8, 16, 4, 1e-5)
    found = DECOMPOSITIONS[forward](x, weight, bias, 2, 8, 16, 4, 1e-5)
    assert [t.dtype for t in found] == [t.dtype for t in wanted] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (2, 8, 256)], ids=str)
def test_runtimes_group_norm_survives_a_mean_a_thousand_times_the_spread(shape: tuple[int, ...]) -> None:
    """The variance as E[x^2] - E[x]^2 would be off by several per cent here."""
    x, dy, weight, bias = norm_arguments(shape, torch.float32, "weight and bias", "nhwc", 1e3, torch.float32)
    forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default
    wide, slope = x.double().contiguous(), dy.double().contiguous()
    exact = forward(wide, weight.double(), bias.double(), 2, 8, 256, 4, 1e-5)  # type: ignore[union-attr]
    found = DECOMPOSITIONS[forward](x, weight, bias, 2, 8, 256, 4, 1e-5)
    for mine, reference, tol in zip(found, exact, (5e-4, 1e-6, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=tol, atol=tol)
    mask = [True, False, False]
    gradient = backward(slope, wide, exact[1], exact[2], weight.double(), 2, 8, 256, 4, mask)[0]  # type: ignore[union-attr]
    mine = DECOMPOSITIONS[backward](dy, x, found[1], found[2], weight, 2, 8, 256, 4, mask)[0]
    torch.testing.assert_close(mine.double(), gradient, rtol=0, atol=5e-4)
