"""The operations of dgfast/ops.py in plain torch are their formulas, and what the networks wrote before."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import ops
from dgfast.nets.blocks import GroupNorm
from tests.support.kernels import FLOATS, UPDATES, NormCase, images, in_float64, listed, per_sample, update_arguments


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


@pytest.mark.parametrize("name", UPDATES)
def test_kernels_update_references_are_the_formulas(name: str) -> None:
    """One pixel of each sample in Python's own arithmetic."""
    arguments = in_float64(update_arguments(name, torch.float64, "nhwc", extras=True))
    results = listed(getattr(ops, name)(**arguments))
    for i in range(3):
        v = {k: v.flatten(1)[i, -1].item() for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim == 4}
        v |= {k: v.flatten()[i].item() for k, v in arguments.items() if isinstance(v, Tensor) and v.numel() == 3}
        if name == "churn":
            truth = [v["scale_x"] * v["x"] + v["scale_noise"] * v["noise"]]
        elif name == "guide":
            truth = [v["denoised"] + v["gate"] * v["gradient"]]
        else:
            d = v["a"] * v.get("x_prime", v["x"]) - v["b"] * (v["denoised"] + v["gate"] * v["gradient"])
            mean = d if name == "euler_update" else 0.7 * v["d"] + 0.3 * d
            x_next = v["x"] + v["h"] * mean
            truth = [x_next, *([d] if name == "euler_update" else []), v["c_in"] * x_next]
        assert [r.flatten(1)[i, -1].item() for r in results] == pytest.approx(truth, rel=1e-13)


def test_kernels_euler_update_to_no_noise_ends_at_the_denoised_image() -> None:
    """EDM's coordinates: a = b = 1 / sigma, h = -sigma."""
    x, denoised, sigma = images(0, torch.float64), images(1, torch.float32), per_sample(3, 2)
    x_next, _, net_input = ops.euler_update(x, denoised, 1 / sigma, 1 / sigma, -sigma)
    torch.testing.assert_close(x_next, denoised.double(), rtol=1e-12, atol=1e-12)
    assert net_input is None
