"""A guided denoiser to run in another way, inputs at every noise level, and how far results may be off."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from dgfast.graph import Function

NetFactory = Callable[..., Any]
Example = Sequence[Tensor | None]
aten = torch.ops.aten

FLOAT32_TOL = 2e-5  # relative, and sample by sample: float32 in another order of summation
WINDOW = (0.2, 0.8)  # of tau: noise levels of about 0.7 to 26
LEVELS = (0.002, 0.6, 0.9, 3.0, 20.0, 80.0)  # below, inside and above
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noisy_images(batch: int, seed: int, size: int = 8) -> Tensor:
    return torch.randn(batch, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at_levels(batch: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """x and sigma: a batch in which every sample has a noise level of its own."""
    levels = [LEVELS[(first + k) % len(LEVELS)] for k in range(batch)]
    sigma = torch.tensor(levels, dtype=torch.float64)
    return (0.5 + sigma).view(-1, 1, 1, 1) * noisy_images(batch, seed), sigma


def one_hot(batch: int, classes: int) -> Tensor | None:
    return F.one_hot(torch.arange(batch) % classes, classes).float() if classes else None


def largest_error(mine: Tensor, reference: Tensor) -> float:
    """The largest relative error of a sample."""
    assert mine.shape == reference.shape and mine.dtype == reference.dtype
    errors = (mine - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)
    return errors.max().item()


def layout(x: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the dimensions in which there is any step to take."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@dataclass(frozen=True)
class Case:
    """A guided denoiser to lower."""

    model_type: str
    classes: int
    batch: int
    channels_last: bool

    def __str__(self) -> str:
        order = "nhwc" if self.channels_last else "nchw"
        return f"{self.model_type}, {self.classes} classes, batch {self.batch}, {order}"


@dataclass
class Lowered:
    """What became of it. `state` is a copy of its networks' weights, made before, with their memory order."""

    case: Case
    function: Function
    graph: GraphModule
    networks: list[nn.Module]
    state: list[tuple[Tensor, tuple[int, ...]]]

    def operations(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


CASES = [
    Case("SongUNet", 0, 3, True),
    Case("SongUNet", 0, 3, False),
    Case("SongUNet", 0, 1, True),
    Case("DhariwalUNet", 3, 3, True),
    Case("DhariwalUNet", 3, 1, False),
]


def weights_of(networks: list[nn.Module]) -> list[tuple[Tensor, tuple[int, ...]]]:
    return [(tensor.clone(), tensor.stride()) for net in networks for tensor in net.state_dict().values()]


def fresh_inputs(case: Case) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """None of them what was traced; every noise level in its turn, labels in another order."""
    for first in range(0, len(LEVELS), case.batch):
        labels = one_hot(case.batch, case.classes)
        yield *at_levels(case.batch, seed=1 + first, first=first), None if labels is None else labels.flip(0)
