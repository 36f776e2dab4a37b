"""What an ONNX graph is made of: values with their shapes, of which the batch may be open, and operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """A size that is `times` the batch size, where that is open."""

    times: int


Dim = int | Batch
Shape = tuple[Dim, ...]

NUMPY = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.int64: np.int64,
    torch.int32: np.int32, torch.bool: np.bool_, torch.uint8: np.uint8,
}  # fmt: skip
"""Types of tensors in a file."""
STATISTIC = "statistic_"
"""How the names of nodes begin that sum over an image: in half precision they would overflow."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph; `dtype` is a numpy type."""

    name: str
    shape: Shape
    dtype: Any


@dataclass
class Record:
    """One operation; its attributes are those of ONNX."""

    op: str
    inputs: tuple[str, ...]
    outputs: list[str]
    attributes: dict[str, Any]


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an operation of two tensors of these shapes."""
    rank = max(len(a), len(b))
    left, right = ((1,) * (rank - len(s)) + s for s in (a, b))
    return tuple(q if p == 1 else p for p, q in zip(left, right, strict=True))


def elements(shape: Sequence[Dim]) -> int:
    """How many numbers a tensor of known size has."""
    return prod(number(d) for d in shape)


def number(dim: Dim) -> int:
    """A size that is known."""
    assert isinstance(dim, int), "a size that depends on the batch where none may"
    return dim
