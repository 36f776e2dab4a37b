"""The input gradient of a convolution becomes a convolution, and oneDNN gets the weights of those that it may."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dgfast.errors import UserError
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.cpu import onednn
from tests.support.runtimes import aten


# Convolutions' input gradients ----------------------------------------------------------------------------------------
@dataclass
class Convolution:
    """One convolution, in any of its forms, as (x) -> y."""

    size: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    groups: int
    channels: tuple[int, int]  # in and out, a group
    transposed: bool

    def weight(self) -> Tensor:
        ins, outs = self.channels
        rows, columns = (ins * self.groups, outs) if self.transposed else (outs * self.groups, ins)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(rows, columns, *self.kernel, dtype=torch.float64, generator=generator)

    def image(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, self.channels[0] * self.groups, *self.size, dtype=torch.float64, generator=generator)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    @property
    def turns(self) -> bool:
        """Whether its input gradient can be written as a convolution that is not transposed."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        inside = all(p <= r for p, r in zip(self.padding, reach, strict=True))
        return self.transposed or (set(self.stride) == {1} and self.groups == 1 and inside)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    dims, transposed = draw(st.sampled_from([1, 2])), draw(st.booleans())

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dims)]

    kernel, padding, dilation = each(1, 4), each(0, 4), each(1, 2)
    stride = [1] * dims if draw(st.booleans()) else each(1, 3)
    size, output_padding = each(0, 5), [0] * dims
    for i in range(dims):
        reach = dilation[i] * (kernel[i] - 1)
        if transposed:
            output_padding[i] = draw(st.integers(0, max(stride[i], dilation[i]) - 1))
            shortest = (2 * padding[i] - reach - output_padding[i]) // stride[i] + 2  # one pixel comes out
        else:
            shortest = reach + 1 - 2 * padding[i]
        size[i] += max(1, shortest)
    groups, channels = draw(st.sampled_from([1, 1, 2, 3])), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return Convolution(size, kernel, stride, padding, dilation, output_padding, groups, channels, transposed)


@settings(max_examples=60)
@given(convolution=convolutions(), channels_last=st.booleans())
def test_runtimes_input_gradient_of_any_convolution_is_a_convolution(
    convolution: Convolution, channels_last: bool
) -> None:
    weight = convolution.weight()

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(convolution(x, weight).square().sum(), x)

    graph = lower(trace(gradient, [convolution.image(0)]), [convolution.image(0)], channels_last)
    x = convolution.image(2)
    torch.testing.assert_close(graph(x)[0], gradient(x)[0], rtol=1e-12, atol=1e-12)
    found = [node for node in graph.graph.nodes if node.target is aten.convolution.default]
    assert len(found) == 2 and "backward" not in graph.code
    assert [node.args[6] for node in found] == [convolution.transposed, not convolution.turns]


def test_runtimes_gradients_of_weights_are_refused() -> None:
    weight = torch.ones(1, 1, 3, 3, requires_grad=True)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.conv2d(x, weight).square().sum(), [x, weight])

    example = [torch.ones(1, 1, 5, 5)]
    with pytest.raises(UserError, match="freeze it"):
        lower(trace(gradient, example), example)


# oneDNN ---------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
def test_runtimes_onednn_packs_what_it_may_and_nothing_else() -> None:
    """2-D, float32, constant weights; every stride, padding, dilation and group. The rest stays as it is."""
    generator = torch.Generator().manual_seed(3)
    plain, grouped, last, narrow = (
        torch.randn(size, generator=generator) for size in ((6, 4, 3, 3), (6, 3, 3, 2), (6, 2, 3, 3), (2, 2, 3))
    )
    bias = torch.randn(6, generator=generator)

    def function(x: Tensor, given_weight: Tensor) -> tuple[Tensor, ...]:
        y = F.conv2d(x, plain, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        y = F.silu(F.conv2d(y, grouped, padding=1, groups=2))
        up = F.conv_transpose2d(y, last, stride=2)
        line = F.conv1d(up.mean(2), narrow)
        return up, line, F.conv2d(x, given_weight), F.conv2d(x.double(), plain.double())

    example = [torch.randn(2, 4, 9, 8, generator=generator), torch.randn(3, 4, 1, 1, generator=generator)]
    for channels_last in (False, True):
        graph = lower(trace(function, example), example, channels_last)
        inputs = [torch.randn(x.shape, generator=generator) for x in example]
        onednn.pack(graph)
        for found, wanted in zip(graph(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        left = [node for node in graph.graph.nodes if node.target is aten.convolution.default]
        kinds = [(node.args[6], node.meta["val"].dim(), node.meta["val"].dtype) for node in left]
        unpacked = [(True, 4, torch.float32), (False, 4, torch.float32), (False, 4, torch.float64)]
        if not channels_last:  # a line is a 2-D convolution of height 1 there
            unpacked.insert(1, (False, 3, torch.float32))
        assert kinds == unpacked
        packed = [node for node in graph.graph.nodes if "_convolution_pointwise" in str(node.target)]
        assert len(packed) == 3 if channels_last else 2
