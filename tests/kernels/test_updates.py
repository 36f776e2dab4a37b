"""The kernels of the solver's steps and of guidance against float64."""

import pytest
import torch

from dgfast import ops
from tests.support.kernels import RTOL, UPDATES, error, in_float64, listed, runs_kernels, update_arguments


@runs_kernels
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("order", ["nchw", "nhwc", "part"])
@pytest.mark.parametrize("state", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_kernels_updates_match_float64(name: str, state: torch.dtype, order: str, extras: bool) -> None:
    arguments = update_arguments(name, state, order, extras)
    with ops.kernels("triton"):
        results = listed(getattr(ops, name)(**arguments))
    truths = listed(getattr(ops, f"{name}_reference")(**in_float64(arguments)))
    dtypes = [state] * len(results) if "c_in" not in arguments else [*[state] * (len(results) - 1), torch.bfloat16]
    for value, truth, dtype in zip(results, truths, dtypes, strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=torch.contiguous_format if order == "nchw" else torch.channels_last)
        assert error(value, truth, RTOL[dtype], atol=RTOL[state]) <= 1


@runs_kernels
@pytest.mark.parametrize("name", UPDATES)
def test_kernels_updates_refuse_other_shapes(name: str) -> None:
    arguments = update_arguments(name, torch.float32, "nchw", extras=False)
    image = {"churn": "noise", "guide": "gradient"}.get(name, "denoised")
    coefficient = {"churn": "scale_x", "guide": "gate"}.get(name, "a")
    with ops.kernels("triton"):
        with pytest.raises(ValueError, match="does not match"):
            getattr(ops, name)(**arguments | {image: arguments[image][:, :4]})
        with pytest.raises(ValueError, match="2 coefficients"):
            getattr(ops, name)(**arguments | {coefficient: arguments[coefficient][:2]})
