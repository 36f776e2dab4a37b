"""What ONNX Runtime's CUDA provider is asked for, and its CUDA graphs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FUSED = "onnxruntime-cuda"
"""`--for` of a file with operators that this provider alone has."""
log = logging.getLogger("dgfast")


@dataclass(frozen=True)
class CudaOptions:
    """How it executes a file; `python benchmarks/gpu.py` measures each choice.

    Attributes:
        graph: replay a call as one CUDA graph: for files of one batch size.
        nhwc: lay images out with the channels last.
        search: how it chooses cuDNN's convolutions: "EXHAUSTIVE", "HEURISTIC" or "DEFAULT".
        tensor_cores: whether float32 products may round to TensorFloat-32. Without it the provider refuses tensor cores
            to half precision too: it deselects every such plan of cuDNN's frontend, whatever the type of the numbers,
            prints "No execution plans support the graph" for each convolution that has no other, and computes the rest
            on plain cores.
    """

    graph: bool = True
    nhwc: bool = False
    search: str = "EXHAUSTIVE"
    tensor_cores: bool = False

    def provider_options(self) -> dict[str, Any]:
        """The same by the provider's names."""
        return {
            "use_tf32": int(self.tensor_cores), "enable_cuda_graph": int(self.graph), "prefer_nhwc": int(self.nhwc),
            "cudnn_conv_algo_search": self.search,
        }  # fmt: skip


def suited(said: Mapping[str, str]) -> CudaOptions:
    """What suits a file that says so of itself: see `file.said`."""
    half = said.get("dtype") == "fp16"
    if half:
        log.warning("half precision on ONNX Runtime's tensor cores: its float32 products round to TensorFloat-32 too")
    return CudaOptions(
        graph=said.get("batch", "").isdecimal(), nhwc=said.get("for") == FUSED,
        tensor_cores=half or torch.get_float32_matmul_precision() != "highest",
    )  # fmt: skip


class Replay:
    """Calls of a session that has a CUDA graph: the graph reads and writes the memory that it was captured with.

    Arguments are copied to where those of the first call lay, results from where its results lay.
    """

    def __init__(
        self, run: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None], outputs: Mapping[str, Tensor]
    ) -> None:
        """
        Args:
            run: executes the session on inputs and outputs where they lie. outputs: of the sizes of its results.
        """
        self._run, self._outputs = run, outputs
        self._inputs: dict[str, Tensor] = {}

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in arguments.items():
            if name in self._inputs:
                self._inputs[name].copy_(tensor)
            else:
                self._inputs[name] = tensor.clone()
        self._run(self._inputs, self._outputs)
        return {name: tensor.clone() for name, tensor in self._outputs.items()}
