"""The runtimes that are compared; a new one is one line of `RUNTIMES`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import PRECISIONS, TORCH_DEFAULT

Function = Callable[..., tuple[Tensor, ...]]
Build = Callable[[Function, Sequence[Tensor | None]], Function]


@dataclass(frozen=True)
class Runtime:
    """A way to execute the guided denoiser; without anything, plain eager.

    Attributes:
        build: (function, example of its arguments) -> a faster callable of the same.
        missing: why it can't run on that device, "" if it can. precisions: those that it can be asked for.
        slack: how many times the tolerance of a compiled result its own may be off; ONNX Runtime sums otherwise.
        capture: on CUDA, the same once more for what `build` made: for one guided call, or a whole step of a sampler.
    """

    build: Build | None = None
    capture: Build | None = None
    missing: Callable[[torch.device], str] = lambda device: ""
    precisions: Collection[str] = (*PRECISIONS, TORCH_DEFAULT)
    slack: float = 1.0

    def call(self, function: Function, example: Sequence[Tensor | None], device: torch.device) -> Function:
        """One guided call in this runtime."""
        built = self.build(function, example) if self.build else function
        return self.capture(built, example) if self.capture and device.type == "cuda" else built

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """What a `Sampler` takes to run in this runtime."""
        captured = {"step_runtime": self.capture} if self.capture and device.type == "cuda" else {}
        return {"runtime": self.build, **captured}


def _of(module: str) -> Build:
    """`build` of a module of dgfast.runtimes, imported when it is first called."""
    return lambda function, example: import_module(f"dgfast.runtimes.{module}").build(function, example)


def _tensorrt(function: Function, example: Sequence[Tensor | None]) -> Function:
    from dgfast.export.function_engine import build

    return build(function, example)


def tensorrt_missing(device: torch.device) -> str:
    """Why there is no TensorRT engine on that device: not CUDA, no library, or none for this GPU."""
    from dgfast.errors import UserError
    from dgfast.runtimes.tensorrt_library import find

    if device.type != "cuda":
        return "TensorRT runs on CUDA only"
    try:
        flavor, _ = find()
    except UserError as error:
        return error.message
    if flavor == "tensorrt-rtx" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return "TensorRT for RTX does not support this GPU"
    return ""


RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(),
    "compiled": Runtime(_of("compiled"), capture=_of("cuda_graph")),
    "onnx": Runtime(_of("onnx"), slack=5),
    "tensorrt": Runtime(_tensorrt, missing=tensorrt_missing, precisions=("float32",), slack=5),
}
