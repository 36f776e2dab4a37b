"""The kernel of group normalisation and that of its gradient against float64."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import ops
from tests.support.kernels import DEVICE, FLOATS, RTOL, NormCase, error, in_float64, runs_kernels

SHAPES = {
    "odd": ((3, 12, 7, 7), 3),
    "six-a-group": ((2, 24, 5, 3), 4),
    "one-group": ((2, 48, 4, 4), 1),
    "one-a-group": ((2, 5, 6, 6), 5),
    "one-pixel": ((2, 8, 1, 1), 2),
    "one-channel": ((2, 1, 5, 5), 1),
    "wide": ((1, 256, 4, 4), 16),
    "looped": ((1, 32, 32, 32), 8),
    "looped-odd": ((2, 12, 43, 37), 3),
}


def norm_and_gradient(case: NormCase) -> tuple[Tensor, Tensor]:
    """Both from the kernels."""
    arguments = case.arguments()
    arguments["x"].requires_grad_()
    with ops.kernels("triton"):
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y, arguments["x"], case.gradient())
    return y.detach(), dx


def true_norm_and_gradient(case: NormCase) -> tuple[Tensor, Tensor]:
    """Both from autograd of the reference in float64, for the same rounded inputs."""
    arguments = in_float64(case.arguments())
    arguments["x"].requires_grad_()
    y = ops.group_norm_silu_reference(**arguments)
    (dx,) = torch.autograd.grad(y, arguments["x"], case.gradient().double().cpu())
    return y.detach(), dx


@runs_kernels
@pytest.mark.parametrize("order", ["nhwc", "nchw", "part"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_group_norm_matches_float64(name: str, dtype: torch.dtype, order: str) -> None:
    case = NormCase(*SHAPES[name], dtype=dtype, order=order)
    y, dx = norm_and_gradient(case)
    true_y, true_dx = true_norm_and_gradient(case)
    assert y.dtype == dx.dtype == dtype
    memory = torch.contiguous_format if order == "nchw" else torch.channels_last
    assert y.is_contiguous(memory_format=memory) and dx.is_contiguous(memory_format=memory)
    assert error(y, true_y, RTOL[dtype], atol=1e-5) <= 1
    assert error(dx, true_dx, RTOL[dtype], atol=1e-5 * float(true_dx.abs().max())) <= 1


OPTIONS = [
    tuple(o for o, on in zip(NormCase.options, chosen, strict=True) if on) for chosen in product((0, 1), repeat=4)
]


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_kernels_group_norm_options(options: tuple[str, ...]) -> None:
    case = NormCase((2, 6, 5, 7), 2, options=options)
    for value, truth in zip(norm_and_gradient(case), true_norm_and_gradient(case), strict=True):
        assert error(value, truth, 1e-5, atol=1e-5) <= 1


# numpy's, in the interpreter: where nothing is stored, or where the activation is 0 anyway
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@runs_kernels
@overflows
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 8, 80, 80)], ids=["resident", "looped"])
def test_kernels_group_norm_survives_a_mean_far_beyond_the_deviation(shape: tuple[int, int, int, int]) -> None:
    """float32 resolves 1000 to 6e-5; E[x^2] - E[x]^2 would be off by 6e-2."""
    case = NormCase(shape, 2, mean=1000.0)
    for value, truth in zip(norm_and_gradient(case), true_norm_and_gradient(case), strict=True):
        assert error(value, truth, 0, atol=1e-3 * float(truth.abs().max())) <= 1


@runs_kernels
@pytest.mark.parametrize("order", ["nhwc", "nchw"])
def test_kernels_group_norm_of_a_constant_image_is_its_bias(order: str) -> None:
    """Deviation 0, where only eps stands between the kernel and 0 / 0; gradients must be finite too."""
    arguments = NormCase((2, 8, 70, 70), 2, order=order, options=()).arguments()
    arguments["x"] = torch.full_like(arguments["x"], 3.0).requires_grad_()
    with ops.kernels("triton"):
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y.sum(), arguments["x"])
    # A mean wrong in its last bit, 2e-7 of 3, is multiplied by 1 / sqrt(eps) = 316 and the weight.
    torch.testing.assert_close(y.detach(), arguments["bias"][:, None, None].expand_as(y), rtol=0, atol=1e-3)
    assert bool(dx.isfinite().all())


@runs_kernels
@overflows
def test_kernels_group_norm_activation_is_finite_far_out() -> None:
    case = NormCase((2, 8, 5, 5), 2)
    arguments = case.arguments()
    arguments["weight"] = arguments["weight"] * 1e4
    with ops.kernels("triton"):
        x = arguments["x"].requires_grad_()
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all() & dx.isfinite().all())
    assert error(y.detach(), ops.group_norm_silu_reference(**in_float64(arguments)).detach(), 1e-4, atol=1e-2) <= 1


@runs_kernels
def test_kernels_group_norm_returns_the_statistics_in_float32() -> None:
    from dgfast.kernels.group_norm_silu import group_norm_silu

    arguments = NormCase((3, 12, 7, 7), 3, torch.bfloat16, options=("channel_bias",)).arguments()
    channel_bias = arguments.pop("channel_bias")
    _, mean, rstd = group_norm_silu(**arguments, scale=None, shift=None, channel_bias=channel_bias)
    grouped = (arguments["x"].double() + channel_bias.double()[:, :, None, None]).reshape(3, 3, -1).cpu()
    assert mean.dtype == rstd.dtype == torch.float32
    assert error(mean, grouped.mean(-1), 1e-6, atol=1e-6) <= 1
    assert error(rstd, (grouped.var(-1, unbiased=False) + 1e-5).rsqrt(), 1e-5, atol=0) <= 1


@runs_kernels
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "channel_bias"])
def test_kernels_group_norm_refuses_gradients_it_does_not_have(name: str) -> None:
    """`ops` hands them to the reference; the operation itself stands in graphs, too."""
    from dgfast.kernels.group_norm_silu import group_norm_silu

    arguments = NormCase((2, 8, 3, 3), 2).arguments()
    leaves = [arguments[key].detach().requires_grad_() for key in ("x", name)]  # torch 2.13 crashes without that of x
    arguments |= dict(zip(("x", name), leaves, strict=True))
    with ops.kernels("triton"):
        gradients = torch.autograd.grad(ops.group_norm_silu(**arguments).sum(), leaves)
    truths = torch.autograd.grad(ops.group_norm_silu_reference(**arguments).sum(), leaves)
    assert all(torch.equal(gradient, truth) for gradient, truth in zip(gradients, truths, strict=True))
    with pytest.raises(RuntimeError, match="gradient for x alone: freeze"):
        group_norm_silu(**arguments)


@runs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, 8, 9)},
        {"x": torch.zeros(2, 8, 3, 3, dtype=torch.float64)},
        {"num_groups": 3},
        {"weight": torch.zeros(7)},
        {"scale": torch.zeros(1, 8)},
        {"channel_bias": torch.zeros(2, 8, 1, 1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_kernels_group_norm_refuses_what_it_would_read_past_the_end_of(wrong: dict[str, Any]) -> None:
    from dgfast.kernels.group_norm_silu import group_norm_silu

    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in wrong.items()}
    with pytest.raises(ValueError, match=r"x must be|groups|per-channel"):
        group_norm_silu(**NormCase((2, 8, 3, 3), 2).arguments() | moved)


@runs_kernels
@pytest.mark.parametrize("change", [Tensor.double, lambda x: x.flatten(2)], ids=["float64", "tokens"])
def test_kernels_group_norm_leaves_what_it_has_not_to_the_reference(change: Callable[[Tensor], Tensor]) -> None:
    arguments = NormCase((2, 8, 3, 3), 2, options=()).arguments()
    arguments = arguments | {
        name: change(arguments[name]) if name == "x" else arguments[name].to(change(arguments["x"]).dtype)
        for name in ("x", "weight", "bias")
    }
    with ops.kernels("triton"):
        assert torch.equal(ops.group_norm_silu(**arguments), ops.group_norm_silu_reference(**arguments))
