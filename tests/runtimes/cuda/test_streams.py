"""Networks that do not wait for one another are told apart, and each stream waits for what it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.nets.discriminator import Discriminator
from dgfast.runtimes.cuda import streams
from tests.support.runtimes import WINDOW, NetFactory, at_levels

LEFT, RIGHT = (torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(k)) / 6 for k in range(2))


def two_networks(x: Tensor) -> tuple[Tensor, ...]:
    """Both read one image; their results meet, and one of them is a result of its own."""
    noisy = x * 2
    left, right = F.conv2d(F.silu(F.conv2d(noisy, LEFT)), LEFT), F.conv2d(noisy, RIGHT).relu()
    return left + right[:, :, 1:-1, 1:-1], right.mean()


def split(function: Callable[..., tuple[Tensor, ...]], example: list[Any]) -> GraphModule | None:
    return streams.split(lower(trace(function, example), example))


def heavy(part: nn.Module) -> int:
    assert isinstance(part, GraphModule)
    return sum(getattr(node.target, "overloadpacket", None) in streams._HEAVY for node in part.graph.nodes)


def image(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_streams_tell_score_and_discriminator_apart(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator]
) -> None:
    guidance = DiscriminatorGuidance(small_discriminator(0), 1.0, WINDOW)
    function = guided_denoiser(tiny_net(), [guidance])
    parts = split(function, [*at_levels(2, seed=0, first=2), None])
    assert parts is not None
    names = {name: heavy(part) for name, part in parts.named_children()}
    branches = {name: count for name, count in names.items() if "branch" in name}
    assert len(branches) == 2 and min(branches.values()) > 10 and sum(names.values()) == sum(branches.values())
    x, sigma = at_levels(2, seed=1, first=2)
    with torch.no_grad():
        for found, wanted in zip(parts(x, sigma, None), function(x, sigma, None), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_streams_keep_weights_inside_of_their_part() -> None:
    parts = split(two_networks, [image(0)])
    assert parts is not None
    calls = list(parts.graph.find_nodes(op="call_module"))
    assert [len(call.args) for call in calls if "branch" in str(call.target)] == [1, 1]
    assert not list(parts.graph.find_nodes(op="get_attr"))
    torch.testing.assert_close(parts(image(1)), two_networks(image(1)))


def test_streams_leave_one_network_whole() -> None:
    """Also two that wait for each other: the second reads the first one's result, and a third reads both."""

    def chain(x: Tensor) -> tuple[Tensor, ...]:
        first, second = F.conv2d(x, LEFT, padding=1), F.conv2d(x, RIGHT, padding=1)
        return (F.conv2d(first + second, LEFT),)

    assert split(lambda x: (F.conv2d(F.conv2d(x, LEFT), RIGHT),), [image(0)]) is None
    assert split(chain, [image(0)]) is None
    assert split(lambda x: (x * 2,), [image(0)]) is None


class Recorder:
    """What a program does with streams, in place of CUDA's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, ...]] = []
        self.current, self._count = "main", 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(self, self._next()))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "stream", self._within)

    def _next(self) -> str:
        self._count += 1
        return f"side{self._count}"

    @contextmanager
    def _within(self, stream: "Stream | None") -> Iterator[None]:
        before, self.current = self.current, stream.name if stream else self.current
        yield
        self.current = before

    def compile(self, part: nn.Module, name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.events.append((self.current, "runs", str(heavy(part))))
            return part(*arguments)

        return run


class Stream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def wait_stream(self, other: "Stream") -> None:
        self.recorder.events.append((self.name, "waits for", other.name))


def test_streams_wait_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = streams.concurrent(lower(trace(two_networks, [image(0)]), [image(0)]), recorder.compile)
    torch.testing.assert_close(run(image(1)), two_networks(image(1)))
    side = [event for event in recorder.events if event[0] == "side1"]
    assert side[0] == ("side1", "waits for", "main") and side[1][1] == "runs" and len(side) == 2
    ran = [event for event in recorder.events if event[1] == "runs"]
    assert sorted(event[2] for event in ran if event[2] != "0") == ["1", "2"] and ran[0] == ("main", "runs", "0")
    joined = ("main", "waits for", "side1")
    forked, branches = recorder.events.index(side[0]), [event for event in ran if event[2] != "0"]
    assert all(recorder.events.index(event) > forked for event in branches), "one network waits for the other"
    last = max(i for i, event in enumerate(recorder.events) if event[1] == "runs")
    assert joined in recorder.events[recorder.events.index(side[1]) : last], "read before it is there"
    assert recorder.events[-1] == joined, "a branch's own result is handed out before it is there"


def test_streams_are_not_needed_for_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = streams.concurrent(lower(trace(lambda x: (F.conv2d(x, LEFT),), [image(0)]), [image(0)]), recorder.compile)
    run(image(1))
    assert recorder.events == [("main", "runs", "1")]
