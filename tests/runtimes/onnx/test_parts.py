"""A batch that is divided among threads gives what the whole batch gives, and leaves no thread behind."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.runtimes.onnx import build as runtime
from dgfast.runtimes.onnx.session import OnnxEngine

Mixing = Callable[[Tensor, Tensor], Tensor]
WAIT = 20.0  # seconds after which a thread that should end counts as one that never does


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every call of ONNX Runtime, on a machine of two cores."""
    called: list[int] = []

    class Engine(OnnxEngine):
        def __call__(self, arguments: Any) -> dict[str, Tensor]:
            called.append(len(arguments["input_0"]))
            return super().__call__(arguments)

    monkeypatch.setattr(runtime, "OnnxEngine", Engine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return called


def attention_over_the_batch(x: Tensor, sigma: Tensor) -> Tensor:
    tokens = x.flatten(1)[None, None]
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[0, 0].view_as(x)


MIXING: dict[str, Mixing] = {
    "turned": lambda x, sigma: x + x.flip(0),
    "attention": attention_over_the_batch,
    "product": lambda x, sigma: (torch.ones(len(x), len(x)) @ x.flatten(1)).view_as(x),
    "the first one": lambda x, sigma: x - x[:1],
    "the mean": lambda x, sigma: x - x.mean(0, keepdim=True),
    "noise levels": lambda x, sigma: x * sigma.flip(0).view(-1, 1, 1, 1),
    "a threshold": lambda x, sigma: torch.where(sigma.amin() > 1e6, 2 * x, x),  # which no usual noise level is above
}


@pytest.mark.parametrize("name", MIXING)
def test_parts_are_not_made_of_a_batch_whose_samples_depend_on_one_another(name: str, sizes: list[int]) -> None:
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.cat([torch.full((8,), 1.0), torch.full((8,), 1e7)])  # the threshold is inside of a part alone

    def function(x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        return (MIXING[name](x, sigma),)

    run = runtime.build(function, (torch.zeros_like(x), torch.ones(16)))
    torch.testing.assert_close(run(x, sigma), function(x, sigma), rtol=1e-4, atol=1e-4)
    assert sizes == [16]


def test_parts_are_made_of_a_batch_of_independent_samples(sizes: list[int]) -> None:
    """In every result: the images and one number a sample."""

    def function(x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        return F.silu(x) * sigma.view(-1, 1, 1, 1), x.sum((1, 2, 3)) - sigma

    x, sigma = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16.0)
    run = runtime.build(function, (torch.zeros_like(x), torch.ones(16)))
    torch.testing.assert_close(run(x, sigma), function(x, sigma), rtol=1e-4, atol=1e-4)
    assert sorted(sizes) == [8, 8]


def test_parts_leave_no_thread_behind(sizes: list[int]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    before = {*threading.enumerate()}
    run = runtime.build(function, (torch.ones(16, 3),))
    run(torch.ones(16, 3))
    own = {*threading.enumerate()} - before
    assert len(sizes) == 2 and own, "nothing was divided"
    del run
    gc.collect()
    latest = time.monotonic() + WAIT
    while any(thread.is_alive() for thread in own) and time.monotonic() < latest:
        time.sleep(0.01)
    assert not [thread for thread in own if thread.is_alive()]
