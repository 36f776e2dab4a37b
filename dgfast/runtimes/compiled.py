"""The guided denoiser through torch.compile.

`torch.autograd.grad` inside a compiled function is where torch.compile breaks, so the function is traced first:
`make_fx` runs it once and records forward and input gradient as one graph of plain operations, in which nothing is
left to differentiate. That graph is compiled whole, for the one shape of the example.
"""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dgfast.guidance import GuidedDenoiser


def trace(function: GuidedDenoiser, example: tuple[Tensor, Tensor, Tensor | None]) -> torch.fx.GraphModule:
    """`function` as one graph of ATen operations, input gradient included, for the shapes of `example`."""
    with torch.no_grad():
        return make_fx(function)(*example)


def build(function: GuidedDenoiser, example: tuple[Tensor, Tensor, Tensor | None]) -> GuidedDenoiser:
    """`function` traced and compiled for the shapes of `example`; it compiles at the first call."""
    return torch.compile(trace(function, example), fullgraph=True, dynamic=False)
