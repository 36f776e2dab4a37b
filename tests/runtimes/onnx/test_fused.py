"""Group normalisation in ONNX Runtime's own operators: which are written where, and that they mean the same.

No kernel of theirs runs here: they are held against a numpy reference of what ONNX Runtime documents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F

from dgfast.export.written_out import written_out
from dgfast.runtimes.onnx.writer import convert, operations

WEIGHT, BIAS = (torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


class GroupNorm(OpRun):
    """y = a(gamma (x - m) / sqrt(v + eps) + beta) of x [N, H, W, C], as ONNX Runtime's ContribOperators.md has it."""

    op_domain = "com.microsoft"

    def _run(
        self, x: Any, gamma: Any, beta: Any, activation: int, channels_last: int, epsilon: float, groups: int
    ) -> tuple[Any]:
        assert channels_last == 1 and x.ndim == 4 and gamma.shape == beta.shape == (x.shape[3],)
        assert gamma.dtype == beta.dtype == np.float32
        grouped = x.astype(np.float64).reshape(*x.shape[:3], groups, -1)
        mean, variance = (moment(grouped, axis=(1, 2, 4), keepdims=True) for moment in (np.mean, np.var))
        y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


class SkipGroupNorm(GroupNorm):
    """The same of x + skip, skip [N, C]."""

    def _run(self, x: Any, gamma: Any, beta: Any, skip: Any, **attributes: Any) -> tuple[Any]:  # type: ignore[override]
        assert skip.shape == (x.shape[0], x.shape[3])
        return super()._run(x + skip[:, None, None], gamma, beta, **attributes)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def silu_of_sum(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + x.mean((2, 3), keepdim=True), 4, WEIGHT, BIAS, eps=1e-3))


def scaled_and_shifted(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 2, WEIGHT, BIAS) * (1 + x.mean((2, 3), keepdim=True)) + 0.5)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "plain": (lambda x: F.group_norm(x + 5, 4, WEIGHT, BIAS), {"GroupNorm": 1}),
    "without weights": (lambda x: F.group_norm(x, 2), {"GroupNorm": 1}),
    "with silu": (lambda x: F.silu(F.group_norm(x, 4, WEIGHT, BIAS)), {"GroupNorm": 1, "Sigmoid": 0}),
    "of a sum, with silu": (silu_of_sum, {"SkipGroupNorm": 1, "Sigmoid": 0, "Add": 0}),
    "scaled and shifted": (scaled_and_shifted, {"GroupNorm": 1, "Sigmoid": 1}),
    "of two images": (lambda x: F.group_norm(x + x.flip(3), 4), {"GroupNorm": 1, "Add": 1}),
    "groups of one channel": (lambda x: F.group_norm(x, 8, WEIGHT, BIAS), {"GroupNorm": 0}),
    "a sequence": (lambda x: F.group_norm(x.flatten(2), 4, WEIGHT, BIAS), {"GroupNorm": 0}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "open"])
def test_onnx_fused_normalisation_is_what_torch_says(name: str, dynamic: bool) -> None:
    function, counts = FUNCTIONS[name]
    model = convert(lambda x: (function(x),), {"x": image(2, 8, 6, 6)}, ["y"], dynamic=dynamic, fused=True)
    counted = operations(model)
    assert {op: counted[op] for op in counts} == counts, counted
    onnx.checker.check_model(model, full_check=True)
    x = image(2, 8, 6, 6, seed=5)
    by_numpy: Any = ReferenceEvaluator(model, new_ops=[GroupNorm, SkipGroupNorm]).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(by_numpy[0], function(x), rtol=1e-5, atol=1e-5)
    replaced = written_out(model)
    assert replaced == counted["GroupNorm"] + counted["SkipGroupNorm"] and not {n.domain for n in model.graph.node} - {
        ""
    }
    assert replaced or model.opset_import[0].version == 18
    np.testing.assert_allclose(by_onnxruntime(model, x), function(x), rtol=1e-5, atol=1e-5)


def test_onnx_normalisation_with_a_gradient_stays_plain() -> None:
    """Its gradient reads the statistics, which the operator does not return; a second one without gradient is fused."""

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = F.silu(F.group_norm(x, 4, WEIGHT, BIAS))
            (dx,) = torch.autograd.grad((y * y).sum(), x)
        return dx, F.group_norm(2 * x.detach(), 2)

    model = convert(gradient, {"x": image(2, 8, 6, 6)}, ["dx", "y"], fused=True)
    assert operations(model)["GroupNorm"] == 1 and operations(model)["Sigmoid"] == 1
    written_out(model)
    x = image(2, 8, 6, 6, seed=5)
    np.testing.assert_allclose(by_onnxruntime(model, x), gradient(x)[0], rtol=1e-4, atol=1e-5)


def test_onnx_portable_file_has_nothing_of_them() -> None:
    model = convert(lambda x: (silu_of_sum(x),), {"x": image(2, 8, 6, 6)}, ["y"])
    assert {node.domain for node in model.graph.node} == {""} == {opset.domain for opset in model.opset_import}


def by_onnxruntime(model: Any, x: Tensor) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]
