"""Attention of our own, and its gradient, against float64: any tokens, depth, layout, cores and registers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu.native import attention, sources

_OURS = (attention._FORWARD, attention._BACKWARD)


def attend(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradients of its product with `grad`."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def tensors(
    batch: int, heads: int, queries: int, keys: int, depth: int, seed: int = 0, tokens_first: bool = True
) -> list[Tensor]:
    """q, k, v and a gradient [batch, heads, tokens, depth]; in memory a token's heads beside each other, or not."""
    generator, made = torch.Generator().manual_seed(seed), []
    for n in (queries, keys, keys, queries):
        size = (batch, n, heads, depth) if tokens_first else (batch, heads, n, depth)
        x = torch.randn(size, generator=generator)
        made.append(x.transpose(1, 2) if tokens_first else x)
    return made


def replaced(function: Callable[..., tuple[Tensor, ...]], example: list[Tensor]) -> torch.fx.GraphModule:
    graph = lower(trace(function, example), example)
    attention.replace(graph)
    return graph


def assert_equals_float64(inputs: list[Tensor], example: list[Tensor]) -> None:
    graph = replaced(attend, example)
    assert not [n for n in graph.graph.nodes if n.target in _OURS], "PyTorch's own attention is left"
    for mine, reference in zip(graph(*inputs), attend(*(x.double() for x in inputs)), strict=True):
        assert (mine - reference).abs().max() < 3e-6 * max(1.0, float(reference.abs().max()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On any machine: with more, a gradient of fewer heads stays PyTorch's."""
    with threads(1):
        yield


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), queries=st.integers(1, 130), keys=st.integers(1, 130),
    depth=st.integers(2, 70), tokens_first=st.booleans(),
)  # fmt: skip
def test_attention_and_its_gradient_equal_float64(
    batch: int, heads: int, queries: int, keys: int, depth: int, tokens_first: bool
) -> None:
    size = batch, heads, queries, keys, depth
    assert_equals_float64(tensors(*size, 1, tokens_first), tensors(*size, 0, tokens_first))


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_attention_gives_the_same_however_cores_share_the_heads(cores: int) -> None:
    with threads(cores):
        assert_equals_float64(tensors(3, 2, 150, 90, 24, seed=1), tensors(3, 2, 150, 90, 24))


def test_attention_gradient_with_fewer_heads_than_cores_stays_pytorchs() -> None:
    with threads(3):
        graph = replaced(attend, tensors(1, 2, 8, 8, 16))
    assert [n.target for n in graph.graph.nodes if n.target in _OURS] == [attention._BACKWARD]


@pytest.mark.parametrize("register", [4, 8, 16])
def test_attention_for_any_processor(monkeypatch: pytest.MonkeyPatch, register: int) -> None:
    for module in (attention, sources):
        monkeypatch.setattr(module, "lanes", lambda: register)
    assert_equals_float64(tensors(1, 2, 40, 50, 20, seed=1), tensors(1, 2, 40, 50, 20))


def test_attention_with_many_keys_takes_fewer_queries_at_a_time() -> None:
    assert_equals_float64(tensors(1, 1, 20, 5000, 8, seed=1), tensors(1, 1, 20, 5000, 8))


def test_attention_survives_large_scores() -> None:
    """Scores of hundreds: only the differences to the largest are exponentiated."""
    q, k, v, grad = tensors(1, 1, 20, 30, 16, seed=1)
    inputs = [30 * q, 30 * k, v, grad]
    graph = replaced(attend, inputs)
    assert 30 * 30 * float((q @ k.mT).abs().max()) / math.sqrt(16) > 500
    exact = attend(*(x.double() for x in inputs))
    for ours, theirs, reference in zip(graph(*inputs), attend(*inputs), exact, strict=True):
        assert (ours - reference).abs().max() <= 4 * (theirs - reference).abs().max() + 1e-6


def test_attention_that_masks_scales_or_drops_stays_pytorchs() -> None:
    q, k, v, _ = tensors(1, 2, 8, 8, 16)
    kinds: list[dict[str, Any]] = [{"is_causal": True}, {"attn_mask": torch.ones(8, 8)}, {"scale": -1.0}]
    for keywords in kinds:
        graph = replaced(lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, **keywords),), [q, k, v])  # noqa: B023
        assert not [n for n in graph.graph.nodes if n.op == "call_module"]
    graph = replaced(lambda q, k, v: (F.scaled_dot_product_attention(q, k, v, scale=0.3),), [q, k, v])
    assert [n for n in graph.graph.nodes if n.op == "call_module"]
    torch.testing.assert_close(graph(q, k, v)[0], F.scaled_dot_product_attention(q, k, v, scale=0.3))
