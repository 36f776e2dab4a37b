"""Inputs of the operations of dgfast/ops.py, and where their kernels can run.

On a GPU they run there, and on the CPU in Triton's interpreter, which is chosen before Triton is first imported.
"""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from dgfast import ops

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Ahead-of-time tracing takes an operation apart into its kernels, of which the interpreter has none.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", *(["test_aot_dispatch_static"] * ON_GPU))

Test = Callable[..., None]


def runs_kernels(test: Test) -> Test:
    """Collect this test only where kernels can run."""
    test.__test__ = ON_GPU or INTERPRETED  # type: ignore[attr-defined]  # pytest's own switch
    return test


# Inputs ---------------------------------------------------------------------------------------------------------------
def in_order(x: Tensor, order: str) -> Tensor:
    """x [B, C, H, W] with the same values in another memory order: nchw, nhwc, or a part of something larger."""
    if order == "part":
        return torch.cat([x, x], dim=3)[..., : x.shape[3]]
    return x.contiguous(memory_format=torch.channels_last if order == "nhwc" else torch.contiguous_format)


def error(value: Tensor, truth: Tensor, rtol: float, atol: float) -> float:
    """Largest error in units of the tolerance; NaN counts as infinite."""
    value = value.double().cpu()
    ratio = ((value - truth).abs() / (rtol * truth.abs() + atol)).max()
    return math.inf if bool(ratio.isnan()) else float(ratio)


# The interpreter truncates when it stores bfloat16, so that a whole unit in the last place may be lost.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class NormCase:
    """A group normalisation of random images, with every option unless told otherwise."""

    shape: tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    order: str = "nhwc"
    options: tuple[str, ...] = ("scale", "shift", "channel_bias", "silu")
    mean: float = 0.3
    eps: float = 1e-5

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

        batch, channels = self.shape[:2]
        scale, shift = normal(batch, 2 * channels).chunk(2, dim=1)  # as the nets have them: rows of a wider tensor
        rows = {"scale": scale, "shift": shift, "channel_bias": normal(batch, channels)}
        return {
            "x": in_order(normal(*self.shape) + self.mean, self.order),
            "num_groups": self.groups,
            "weight": normal(channels),
            "bias": normal(channels),
            "eps": self.eps,
            **{name: row for name, row in rows.items() if name in self.options},
            "silu": "silu" in self.options,
        }

    def gradient(self) -> Tensor:
        grad = torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, self.dtype)
        return in_order(grad, "nchw")  # whatever the order of x


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, after any rounding, on the CPU and in float64."""
    return {k: v.detach().double().cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def images(seed: int, dtype: torch.dtype, order: str = "nchw", shape: tuple[int, ...] = (3, 5, 7, 11)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return in_order(x.to(DEVICE, dtype), order)


class Recorded(TorchDispatchMode):
    """Names of dgfast's own operations among those that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dgfast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def own(graph: GraphModule) -> list[str]:
    """The names of dgfast's own operations that stand in a graph."""
    return [node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "dgfast"]


def called(choice: AbstractContextManager[None], arguments: dict[str, Any] | None = None) -> list[str]:
    """Which of dgfast's own operations a normalisation reaches, of these arguments or of some."""
    with choice, Recorded() as recorded:
        ops.group_norm_silu(**arguments or NormCase((2, 8, 3, 3), 2).arguments())
    return recorded.names
