"""What a network must not do to be traced, and what it is told."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.errors import StorageError, UserError
from dgfast.graph.trace import trace
from dgfast.nets.blocks import GroupNorm


class BranchesOnValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ReadsValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class LoopsOverValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * sum(x.flatten().tolist())


class SelectsByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


@pytest.mark.parametrize("module", [BranchesOnValue, ReadsValue, LoopsOverValues, SelectsByValue, LeavesTorch])
def test_runtimes_network_that_does_not_trace_is_named_with_the_reason(module: type[nn.Module]) -> None:
    net = Outer(module())
    with pytest.raises(UserError, match="this network does not trace: ") as error:
        trace(lambda x: (net(x),), [torch.ones(3)])
    message = str(error.value.message)
    assert "\n" not in message and message.endswith("; run it without --compile")
    assert f"(in Outer.{module.__name__})" in message
    reason = message.removeprefix("this network does not trace: ").split(" (in ")[0]
    assert len(reason) > 10


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(5, 2) @ x


def test_runtimes_errors_of_dgfast_do_not_read_as_the_networks() -> None:
    """What a user is told stays as it is, a bug in dgfast stays a bug; what fails in the network is the network's."""

    def refused(x: Tensor) -> tuple[Tensor, ...]:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match=r"^the disk is full$"):
        trace(refused, [torch.ones(3)])
    own, failing = Outer(GroupNorm(4)), Outer(Fails())
    with pytest.raises(RuntimeError, match="shape"):
        trace(lambda x: (own(x),), [torch.ones(1, 3, 2, 2)])
    where = r"\(in Outer\.Fails\), at test_trace\.py:\d+: return torch\.ones\(5, 2\) @ x; run it without --compile"
    with pytest.raises(UserError, match=rf"does not trace: .*size.* {where}"):
        trace(lambda x: (failing(x),), [torch.ones(3)])


class ReadsItsOwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("scale").item()


def test_runtimes_network_may_read_its_own_weights() -> None:
    """They stay what they are; only what is read of an input would be another value in the next call."""
    net = Outer(ReadsItsOwnWeight())
    graph = trace(lambda x: (net(x),), [torch.ones(3)])
    assert torch.equal(graph(torch.full((3,), 2.0))[0], torch.full((3,), 7.0))


def test_runtimes_function_outside_of_any_module_is_not_named_a_module() -> None:
    with pytest.raises(UserError, match="does not trace") as error:
        trace(lambda x: (x if x.sum() > 0 else -x,), [torch.ones(3)])
    assert "(in " not in str(error.value.message)


def test_runtimes_tracing_costs_no_memory_of_the_batch() -> None:
    """Ten terabytes of images: none of them is ever made."""
    x = torch.zeros(1).expand(10**9, 3, 32, 32)
    graph = trace(lambda x: (F.silu(x) * 2 + F.conv2d(x, torch.ones(3, 3, 3, 3), padding=1),), [x])
    (output,) = graph.graph.output_node().all_input_nodes
    assert output.meta["val"].shape == x.shape
