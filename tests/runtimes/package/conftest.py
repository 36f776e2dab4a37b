"""A small graph with a gradient inside, and its package, made once by all workers: compiling takes ten seconds."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.package.beside import compile_all

Example = tuple[Tensor, None, Tensor]


class Slope(nn.Module):
    """The input gradient of a convolution's score, times a number a sample.

    Its filters are every second of more, as attention takes keys and values apart; its bias is short, its last filter
    zero. One matrix has 4 MB.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.Parameter(torch.randn(8, 2, 3, 3, generator=generator), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)
        self.last = nn.Parameter(torch.zeros(4, 4, 1, 1) + seed, requires_grad=False)
        self.large = nn.Parameter(torch.randn(2 * 8 * 8, 8192, generator=generator), requires_grad=False)

    def forward(self, x: Tensor, nothing: None, sigma: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = F.silu(F.conv2d(x, self.weights[::2], self.bias, padding=1))
            (gradient,) = torch.autograd.grad((hidden + F.conv2d(hidden, self.last)).square().sum(), x)
        image_size = (x.detach().flatten(1) @ self.large).square().mean(1)
        return (
            sigma.view(-1, 1, 1, 1) * gradient,
            hidden.detach().sum((1, 2, 3)),
            image_size,
            torch.full_like(sigma, 7.0),
        )


def arguments(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 8, 8, generator=generator), None, torch.rand(3, generator=generator)


def graph_of(seed: int) -> GraphModule:
    return lower(trace(Slope(seed), arguments(0)), arguments(0))


@pytest.fixture(scope="session")
def package_file(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Of the graph of seed 0, without its weights: compiled in a process of its own, beside one that fails."""

    def make(folder: Path) -> None:
        popen, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

        def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
            started.append(popen(["false"] if started else command, **settings))
            return started[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 4)
            patch.setattr(subprocess, "Popen", start)
            compile_all([(graph_of(seed), arguments(0), folder / f"slope-{seed}.pt2") for seed in (0, 1)])

    return made_once("slope", make) / "slope-0.pt2"
