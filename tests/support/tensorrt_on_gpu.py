"""TensorRT on a pretended GPU: an engine is its ONNX file, which ONNX Runtime executes on the CPU."""

import ctypes
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.tensorrt.builder import Built, Options
from dgfast.runtimes.tensorrt.library import Layer
from tests.support.pretended_cuda import Stream
from tests.support.tensorrt import TRT


def build(trt: Any, flavor: str, path: Path, options: Options) -> Built:
    """In place of `builder.build`, which needs no GPU, but an age."""
    least, *_, most = options.batch
    (first, *_) = onnx.load(path).graph.input
    size = first.type.tensor_type.shape.dim[0].dim_value
    batch = (size, size, size) if size else options.batch
    assert least <= most
    return Built(path.read_bytes(), [], 3, [Layer("all", "onnx", ("Float",))], batch, 0.1)


class Runtime:
    """In place of the library's."""

    validity = "VALID", 0

    def __init__(self, listener: Any) -> None:
        pass

    def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
        name, bits = self.validity
        return getattr(TRT.EngineValidity, name), bits

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine":
        return Engine(plan)


class Engine:
    """In place of the library's `ICudaEngine`."""

    def __init__(self, plan: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder, "plan.onnx")
            path.write_bytes(plan)
            self.onnx = OnnxEngine(path, provider="cpu", device="cpu")
        self.tensors = self.onnx.inputs | self.onnx.outputs
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return [*self.tensors][index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(size, str) else size for size in self.tensors[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return TRT.DataType.FLOAT

    def get_tensor_mode(self, name: str) -> Any:
        return TRT.TensorIOMode.INPUT if name in self.onnx.inputs else TRT.TensorIOMode.OUTPUT

    def create_execution_context(self) -> "Context | None":
        return Context(self)

    def create_engine_inspector(self) -> Any:
        text = "Layers:\nName: a, LayerType: gemm, Inputs: [ { Name: p, Datatype: Float }]"
        return SimpleNamespace(get_engine_information=lambda form: text)


class Context:
    """In place of the library's `IExecutionContext`, which knows tensors by address and shape."""

    def __init__(self, engine: Engine) -> None:
        self._onnx, self._sizes = engine.onnx, dict[str, tuple[int, ...]]()
        self._addresses: dict[str, int] = {}
        self.outputs = [*engine.onnx.outputs]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._sizes[name] = shape
        return list(shape[1:]) == list(self._onnx.inputs[name][0][1:])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self._sizes.values()))[0]
        return tuple(batch if isinstance(size, str) else size for size in self._onnx.outputs[name][0])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        made = self._onnx({name: self.at(name, self._sizes[name]) for name in self._onnx.inputs})
        for name in self.outputs:
            self.at(name, self.get_tensor_shape(name)).copy_(made[name])
        return stream == Stream.cuda_stream

    def at(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = (ctypes.c_float * int(np.prod(shape))).from_address(self._addresses[name])
        return torch.from_numpy(np.ctypeslib.as_array(values).reshape(shape))
