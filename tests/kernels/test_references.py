"""The operations of dgfast/ops.py in plain torch are their formulas, and what the networks wrote before."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import ops
from dgfast.nets.blocks import GroupNorm
from tests.support.kernels import FLOATS, NormCase, in_float64


def test_kernels_group_norm_reference_is_the_formula() -> None:
    arguments = in_float64(NormCase((3, 12, 7, 7), 3).arguments())
    x, eps = arguments["x"] + arguments["channel_bias"][:, :, None, None], arguments["eps"]
    grouped = x.reshape(3, 3, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / ((centred**2).mean(-1, keepdim=True) + eps) ** 0.5).view(x.shape)
    z = normed * arguments["weight"][:, None, None] + arguments["bias"][:, None, None]
    z = z * (1 + arguments["scale"][:, :, None, None]) + arguments["shift"][:, :, None, None]
    torch.testing.assert_close(ops.group_norm_silu(**arguments), z / (1 + (-z).exp()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.group_norm_silu(**arguments | {"silu": False}), z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_group_norm_reference_is_what_the_blocks_write_bit_for_bit(dtype: torch.dtype) -> None:
    norm = GroupNorm(24).to(dtype)
    x, params = torch.randn(2, 24, 5, 5, dtype=dtype), torch.randn(2, 48, dtype=dtype)
    scale, shift = params[:, :, None, None].chunk(2, dim=1)
    vectors = params[:, :24], params[:, 24:]
    norm_arguments = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    ours = ops.group_norm_silu(x, *norm_arguments, *vectors)
    assert torch.equal(ours, F.silu(norm(x) * (scale + 1) + shift))
    assert torch.equal(ops.group_norm_silu(x, *norm_arguments), F.silu(norm(x)))
    added = ops.group_norm_silu(x, *norm_arguments, channel_bias=params[:, :24], silu=False)
    assert torch.equal(added, norm(x + params[:, :24, None, None]))


def test_kernels_group_norm_reference_has_every_gradient() -> None:
    arguments = in_float64(NormCase((2, 4, 2, 3), 2).arguments())
    tensors = {k: v.detach().clone().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}

    def function(*values: Tensor) -> Tensor:
        return ops.group_norm_silu(**arguments | dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
