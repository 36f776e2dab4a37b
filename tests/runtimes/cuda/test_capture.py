"""A captured function reads and writes at fixed addresses: what is asked of it must be what it was captured for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.job import Job
from dgfast.networks import Networks
from dgfast.runtimes import RUNTIMES, Runtime
from dgfast.runtimes.cuda.capture import capture
from dgfast.sampler import Sampler
from dgfast.stepping import Stepping
from tests.runtimes.cuda.test_streams import Recorder
from tests.support.pretended_cuda import STREAMS, Graph
from tests.support.runtimes import NetFactory, one_hot


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs on the CPU."""
    for name, stands_in in STREAMS.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)


def function(x: Tensor, shift: Tensor | None) -> tuple[Tensor, ...]:
    y = 2 * x if shift is None else 2 * x + shift
    return y, y.sum(-1)


def test_capture_computes_with_what_it_is_given() -> None:
    example = torch.ones(2, 3), torch.ones(3)
    run = capture(function, example)
    inputs = [(torch.full((2, 3), value), torch.arange(3.0)) for value in (5.0, 7.0)]
    results = [run(*arguments) for arguments in inputs]  # the second must not overwrite the first
    for arguments, result in zip(inputs, results, strict=True):
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(result, function(*arguments), strict=True))
    assert torch.equal(example[0], torch.ones(2, 3)) and torch.equal(example[1], torch.ones(3))


@pytest.mark.parametrize(
    "arguments",
    [(torch.ones(2, 3), None), (torch.ones(1, 3), torch.ones(3)), (torch.ones(2, 3).double(), torch.ones(3))],
    ids=["None", "one row", "another type"],
)
def test_capture_refuses_what_it_was_not_captured_for(arguments: tuple[Tensor, Tensor | None]) -> None:
    run = capture(function, (torch.ones(2, 3), torch.ones(3)))
    with pytest.raises(AssertionError, match=r"captured for .* called with "):
        run(*arguments)
    without = capture(function, (torch.ones(2, 3), None))
    with pytest.raises(AssertionError, match=r"captured for .*None.* called with "):
        without(torch.ones(2, 3), torch.ones(3))


def test_capture_warms_up_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made lazily must be there before, and other threads must not end a capture that they know nothing of."""
    recorder, settings = Recorder(monkeypatch), list[str]()

    def graph(graph: Graph, capture_error_mode: str) -> Graph:
        settings.append(capture_error_mode)
        return graph

    def noted(x: Tensor) -> tuple[Tensor, ...]:
        recorder.events.append((recorder.current, "runs"))
        return (x + 1,)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture(noted, [torch.ones(2)])
    warm_up = [("side1", "waits for", "main"), *3 * [("side1", "runs")], ("main", "waits for", "side1")]
    assert recorder.events == [*warm_up, ("main", "runs")] and settings == ["thread_local"]


def captured() -> Runtime:
    """Calls and whole steps, each captured by itself."""
    return Runtime("captured", capture)


def test_capture_serves_a_sampler_with_labels_and_without(tiny_net: NetFactory) -> None:
    networks, sampling = Networks(tiny_net(label_dim=3)), SamplingConfig(num_steps=3)
    plain = Sampler(networks, sampling)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = [plain.integrate(latents, labels) for labels in (None, one_hot(2, 3), None)]
    assert not torch.equal(wanted[0], wanted[1])
    for runtime in (captured(), Runtime("captured steps", RUNTIMES["eager"].build, lambda device: capture)):
        sampler = Sampler(networks, sampling, runtime=runtime)
        for labels, images in zip((None, one_hot(2, 3), None), wanted, strict=True):
            torch.testing.assert_close(sampler.integrate(latents, labels), images)


def test_capture_keeps_the_gradient_apart(tiny_net: NetFactory, small_discriminator: Callable[[int], Any]) -> None:
    """A function that returns the discriminator's gradient too is another one."""
    networks, guidance = Networks(tiny_net(), small_discriminator(0)), GuidanceConfig(dg_weight=1.0)
    job = Job(networks, SamplingConfig(num_steps=3), guidance)
    stepping = Stepping(job, RUNTIMES["eager"], torch.device("cpu"), torch.float64)
    example = torch.ones(2, 1, 8, 8, dtype=torch.float64), torch.ones(2, dtype=torch.float64), None
    guidances = job.steps[0].predictor
    lengths = [len(stepping.function(guidances, example, keep)(*example)) for keep in (False, True, False)]
    assert lengths == [2, 3, 2]
