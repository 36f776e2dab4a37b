"""Group normalisation in ONNX Runtime's own operators: which are written where, and that they mean the same.

No kernel of theirs runs here: they are held against a numpy reference of what ONNX Runtime documents.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F

from dgfast.export.half_products import half_products
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
    """The same of s = x + skip, skip [N, C], [N, 1, 1, C] or [N, H, W, C]; and s, where it is asked for."""

    def _run(  # type: ignore[override]
        self, x: Any, gamma: Any, beta: Any, skip: Any, **attributes: Any
    ) -> tuple[Any, ...]:
        n, _, _, c = x.shape
        assert skip.shape in ((n, c), (n, 1, 1, c), x.shape) and skip.dtype == x.dtype
        total = x + (skip if skip.ndim == 4 else skip[:, None, None])
        return (*super()._run(total, gamma, beta, **attributes), total)[: len(self.onnx_node.output)]


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
    "with silu twice": (lambda x: F.silu(F.silu(F.group_norm(x, 4, WEIGHT, BIAS))), {"GroupNorm": 1, "Sigmoid": 1}),
    "of a sum, with silu": (silu_of_sum, {"SkipGroupNorm": 1, "Sigmoid": 0, "Add": 0}),
    "scaled and shifted": (scaled_and_shifted, {"GroupNorm": 1, "Sigmoid": 1}),
    "groups of one channel": (lambda x: F.group_norm(x, 8, WEIGHT, BIAS), {"GroupNorm": 0}),
    "a sequence": (lambda x: F.group_norm(x.flatten(2), 4, WEIGHT, BIAS), {"GroupNorm": 0}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "open"])
def test_onnx_fused_normalisation_is_what_torch_says(name: str, dynamic: bool) -> None:
    function, counts = FUNCTIONS[name]
    proved(lambda x: (function(x),), counts, dynamic=dynamic)


def proved(
    function: Callable[[Tensor], tuple[Tensor, ...]], counts: dict[str, int], *, dynamic: bool = False, size: int = 6
) -> Counter[str]:
    """Convert, count and run it, by numpy and written out; the operations."""
    names, x = [f"y{i}" for i in range(len(function(image(2, 8, size, size))))], image(2, 8, size, size, seed=5)
    model = convert(function, {"x": image(2, 8, size, size)}, names, dynamic=dynamic, fused=True)
    counted = operations(model)
    assert {op: counted[op] for op in counts} == counts, counted
    onnx.checker.check_model(model, full_check=True)
    by_numpy: Any = ReferenceEvaluator(model, new_ops=[GroupNorm, SkipGroupNorm]).run(None, {"x": x.numpy()})
    replaced = written_out(model)
    assert replaced == counted["GroupNorm"] + counted["SkipGroupNorm"]
    assert {node.domain for node in model.graph.node} == {""}
    for results in (by_numpy, by_onnxruntime(model, x)):
        for result, y in zip(results, function(x), strict=True):
            np.testing.assert_allclose(result, y, rtol=1e-5, atol=1e-5)
    return counted


# Sums that a normalisation reads --------------------------------------------------------------------------------------
KERNEL, ROW, PLANES, SCALES = (
    image(8, 8, 3, 3, seed=3) / 8,
    image(1, 8, 1, 6),
    image(1, 8, 6, 6),
    WEIGHT.view(1, 8, 1, 1),
)


def conv(x: Tensor) -> Tensor:
    return F.conv2d(x, KERNEL, padding=1)


def norm(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 4, WEIGHT, BIAS))


def block(x: Tensor) -> Tensor:
    return x + conv(norm(x))


def used_twice(x: Tensor) -> tuple[Tensor, ...]:
    total = x + conv(x)
    return norm(total), total * 2


def read_before(x: Tensor) -> tuple[Tensor, ...]:
    total = x + conv(x)
    before = conv(total)
    return before, norm(total)


def normalised_twice(x: Tensor) -> tuple[Tensor, ...]:
    total = x + conv(x)
    return norm(total), F.group_norm(total, 2)


def with_and_without_silu(x: Tensor) -> tuple[Tensor, ...]:
    y = F.group_norm(x + conv(x), 4)
    return y, F.silu(y)


def last_sum_first(x: Tensor) -> tuple[Tensor, ...]:
    first = x + conv(x)
    second = first + x.flip(3)
    return norm(second), norm(first)


def per_channel_used_twice(x: Tensor) -> tuple[Tensor, ...]:
    total = x.mean((2, 3), keepdim=True) + x
    return norm(total), total.exp()


def weighted_by_itself(x: Tensor) -> tuple[Tensor, ...]:
    total = x + conv(x)
    return (F.group_norm(total, 4, total.mean((0, 2, 3)), BIAS),)


def scaled(x: Tensor, by: float) -> tuple[Tensor, ...]:
    total = (x + conv(x)) * by
    return F.group_norm(total, 4, WEIGHT, BIAS, eps=0.3), total


PLAIN, TAKEN = {"GroupNorm": 1, "SkipGroupNorm": 0}, {"GroupNorm": 0, "SkipGroupNorm": 1}
SUMS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], dict[str, int]]] = {
    "used once": (lambda x: (norm(x + conv(x)),), TAKEN | {"Add": 0, "Transpose": 3}),
    "the other order": (lambda x: (norm(conv(x) + x),), TAKEN | {"Add": 0, "Transpose": 3}),
    "used twice": (used_twice, TAKEN | {"Add": 0, "Transpose": 4}),
    "read before": (read_before, TAKEN | {"Add": 0, "Transpose": 4}),
    "a result itself": (lambda x: (norm(s := x + conv(x)), s), TAKEN | {"Add": 0}),
    "normalised twice": (normalised_twice, {"SkipGroupNorm": 1, "GroupNorm": 1, "Add": 0, "Transpose": 4}),
    "with and without silu": (with_and_without_silu, {"SkipGroupNorm": 1, "GroupNorm": 1, "Add": 0}),
    "three images": (lambda x: (norm(x + conv(x) + x.flip(3)),), TAKEN | {"Add": 1}),
    "with itself": (lambda x: (norm((y := conv(x)) + y),), TAKEN | {"Add": 0, "Transpose": 2}),
    "chain": (lambda x: (norm(block(block(x))),), {"GroupNorm": 1, "SkipGroupNorm": 2, "Add": 0, "Transpose": 6}),
    "last sum first": (last_sum_first, {"SkipGroupNorm": 2, "GroupNorm": 0, "Add": 0}),
    "of normalisations": (lambda x: (norm(norm(x) + norm(conv(x))),), {"SkipGroupNorm": 1, "GroupNorm": 2, "Add": 0}),
    "one number a channel, used twice": (per_channel_used_twice, TAKEN | {"Add": 0}),
    "scaled": (lambda x: scaled(x, 0.5), TAKEN | {"Add": 0, "Mul": 1}),
    "scaled and read by it alone": (lambda x: scaled(x, 0.5)[:1], TAKEN | {"Add": 0, "Mul": 0}),
    "no sum, scaled": (lambda x: (norm(2 * conv(x)),), PLAIN | {"Mul": 0}),
    "scaled by channel": (lambda x: (norm((x + conv(x)) * SCALES),), PLAIN | {"Add": 1, "Mul": 1}),
    "scaled by a number of four dimensions": (lambda x: (norm((x[0] + 1) * SCALES[:, :1]),), PLAIN | {"Mul": 1}),
    "turned round": (lambda x: scaled(x, -0.5), PLAIN | {"Add": 1, "Mul": 1}),
    "one row for all": (lambda x: (norm(x + ROW),), PLAIN | {"Add": 1}),
    "one image for all": (lambda x: (norm(x + PLANES),), PLAIN | {"Add": 1}),
    "one channel for all": (lambda x: (norm(x + x[:, :1]),), PLAIN | {"Add": 1}),
    "with weights that it gives": (weighted_by_itself, PLAIN | {"Add": 1}),
    "groups of one channel": (lambda x: (F.group_norm(x + conv(x), 8),), {"GroupNorm": 0, "SkipGroupNorm": 0}),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "open"])
def test_onnx_sum_is_computed_by_the_normalisation_that_reads_it(name: str, dynamic: bool) -> None:
    proved(*SUMS[name], dynamic=dynamic)


def test_onnx_sum_of_single_pixels_is_taken_too() -> None:
    proved(SUMS["used twice"][0], TAKEN | {"Add": 0}, size=1)


@given(
    st.lists(st.tuples(st.sampled_from("+cnsm"), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=7),
    st.sets(st.integers(0, 9), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_onnx_no_sum_is_computed_twice(steps: list[tuple[str, int, int]], read: set[int]) -> None:
    """Whatever a function does with its images, in whatever order it reads them."""
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "+": torch.add, "c": lambda a, b: a + b.mean((2, 3), keepdim=True), "n": lambda a, b: F.group_norm(a, 4),
        "s": lambda a, b: norm(a), "m": lambda a, b: 0.5 * a,
    }  # fmt: skip

    def function(x: Tensor) -> tuple[Tensor, ...]:
        images = [x, x.flip(3)]
        for what, first, second in steps:
            images.append(functions[what](images[first % len(images)], images[second % len(images)]))
        return tuple(images[-1 - i % len(images)] for i in read)

    counted = proved(function, {})
    assert counted["Add"] + counted["SkipGroupNorm"] <= sum(what in "+c" for what, *_ in steps)


def test_onnx_sums_among_half_products_are_right() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (norm(block(block(block(conv(x))))),)

    model = convert(function, {"x": image(2, 8, 6, 6)}, ["y"], fused=True)
    assert half_products(model, "fp16") == 2 and operations(model)["SkipGroupNorm"] == 3
    written_out(model)
    x = image(2, 8, 6, 6, seed=5)
    error = np.abs(by_onnxruntime(model, x)[0] - function(x)[0].numpy()).max()
    assert 0 < error < 5e-3


# Gradients ------------------------------------------------------------------------------------------------------------
def test_onnx_normalisation_with_a_gradient_stays_plain() -> None:
    """Its gradient reads the statistics, which the operator does not return; a second one without gradient is fused."""

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = norm(x + x.flip(3))
            (dx,) = torch.autograd.grad((y * y).sum(), x)
        return dx, F.group_norm(2 * x.detach(), 2)

    model = convert(gradient, {"x": image(2, 8, 6, 6)}, ["dx", "y"], fused=True)
    counted = operations(model)
    assert counted["GroupNorm"] == 1 and counted["SkipGroupNorm"] == 0 and counted["Sigmoid"] == 1
    written_out(model)
    x = image(2, 8, 6, 6, seed=5)
    np.testing.assert_allclose(by_onnxruntime(model, x)[0], gradient(x)[0], rtol=1e-4, atol=1e-5)


def test_onnx_portable_file_has_nothing_of_them() -> None:
    model = convert(lambda x: (silu_of_sum(x),), {"x": image(2, 8, 6, 6)}, ["y"])
    assert {node.domain for node in model.graph.node} == {""} == {opset.domain for opset in model.opset_import}


def by_onnxruntime(model: Any, x: Tensor) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})
