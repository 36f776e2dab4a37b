"""A TensorRT engine as a function of CUDA tensors, from TensorRT or from TensorRT for RTX.

Tensors are bound by address: nothing passes through the host, and the engine runs on PyTorch's current stream.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.graph.agreement import PREDICTS_NOISE, least_sizes, relative_error
from dgfast.runtimes.tensorrt import file as engine_file
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import deserialize, find, listener, obstacles


class TensorRTEngine:
    """A loaded engine: {name: tensor} -> {name: tensor}, as `runtimes.onnx.session.OnnxEngine` is. Not for threads.

    Attributes:
        file: what stands beside it on disk. metadata: what the ONNX file said that it was made from.
        inputs, outputs: sizes (a name where they are open) and types of its tensors, by name.
        device: where its tensors lie.
    """

    def __init__(self, trt: Any, engine: Any, file: EngineFile, device: torch.device) -> None:
        """
        Raises:
            UserError: there is not enough memory on the GPU, or a tensor of a type that PyTorch has not.
        """
        self.file, self.device, self.metadata, self._engine = file, device, file.source, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{file.path}: no memory on {device} to run it; build it for a smaller batch")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._dtypes = {name: _dtype(trt, engine.get_tensor_dtype(name), file) for name in names}
        described = {name: (_sizes(engine.get_tensor_shape(name)), self._dtypes[name]) for name in names}
        reads = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs = {name: described[name] for name in names if name in reads}
        self.outputs = {name: described[name] for name in names if name not in reads}

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def batch(self) -> int | None:
        """The batch size that the engine was made for; None where it takes several."""
        least, _, most = self.file.batch
        return least if least == most else None

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Args:
            arguments: the inputs by name; those of another type, layout or device are converted.

        Raises:
            UserError: a missing or superfluous input, one of another shape, a batch outside of the profile.
        """
        context, path = self._context, self.path
        if arguments.keys() != self.inputs.keys():
            raise UserError(f"{path}: its inputs are {', '.join(self.inputs)}, not {', '.join(arguments)}")
        bound = {name: arguments[name].to(self.device, self._dtypes[name]).contiguous() for name in self.inputs}
        for name, tensor in bound.items():
            shape, sizes = tuple(tensor.shape), self.inputs[name][0]
            if sizes[:1] == ("batch",):
                self.file.check_batch(len(tensor))
            if not context.set_input_shape(name, shape):
                raise UserError(f"{path}: {name} has shape {list(shape)}, not {list(sizes)}")
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            bound[name] = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
        for name, tensor in bound.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise UserError(f"{path}: the engine failed to run")
        return {name: bound[name] for name in self.outputs}

    def self_test(self) -> None:
        """Run the self-test that stands beside the engine, if there is one.

        Raises:
            UserError: an output is off by more than `engine.json` allows; names the first, and by how much.
        """
        if not self.file.self_test.is_file():
            return
        inputs, expected = read_self_test(self.file.self_test)
        tensors, reference = (
            {name: torch.from_numpy(a) for name, a in arrays.items()} for arrays in (inputs, expected)
        )
        check_values(self.file, tensors, self(tensors), reference)


def load(path: str | Path, device: torch.device | str = "cuda") -> TensorRTEngine:
    """The engine at `path` (or in that folder); call its `self_test` before you trust it.

    Raises:
        UserError: no engine there, a broken one, one for another GPU, library or version, or the library or a GPU is
            missing.
    """
    file = engine_file.read(path)
    plan = file.plan()
    flavor, trt = find(file.flavor)
    file.check_library(flavor, trt.__version__)
    at = _cuda(device, file)
    major, minor = torch.cuda.get_device_capability(at)
    file.check_gpu(torch.cuda.get_device_name(at), f"{major}.{minor}")
    with torch.cuda.device(at):
        return _load(trt, plan, file, at)


def _load(trt: Any, plan: bytes, file: EngineFile, device: torch.device) -> TensorRTEngine:
    heard = listener(trt)
    why = obstacles(trt, plan, heard)
    if why:
        raise UserError(f"{file.path}: can't run on {torch.cuda.get_device_name(device)}: {', '.join(why)}")
    return TensorRTEngine(trt, deserialize(trt, plan, heard, file.path), file, device)


def check_values(
    file: EngineFile, inputs: Mapping[str, Tensor], made: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """
    Raises:
        UserError: see `TensorRTEngine.self_test`.
    """
    least = least_sizes(file.source.get(PREDICTS_NOISE) == "true", inputs)
    for name, reference in expected.items():
        off = relative_error(made[name], reference, least.get(name)) if name in made else float("inf")
        if not off <= file.tolerance:
            raise UserError(
                f"{file.path}: its self-test fails here: output {name} is off by {off:.1e} of its sample's largest "
                f"value (allowed {file.tolerance:.0e}); build it again on this machine"
            )


def read_self_test(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and expected outputs, by name.

    Raises:
        UserError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name.partition("/")[::2]: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: not a self-test ({error}); build the engine again") from error
    inputs, outputs = ({name: a for (side, name), a in arrays.items() if side == s} for s in ("input", "output"))
    return inputs, outputs


def _cuda(device: torch.device | str, file: EngineFile) -> torch.device:
    at = torch.device(device)
    if at.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"{file.path}: engines run on NVIDIA GPUs only, and there is none here; use --runtime onnx")
    return at if at.index is not None else torch.device("cuda", torch.cuda.current_device())


def _sizes(shape: Any) -> tuple[int | str, ...]:
    return tuple("batch" if size == -1 else int(size) for size in shape)


def _dtype(trt: Any, dtype: Any, file: EngineFile) -> torch.dtype:
    types = {
        trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT32: torch.int32, trt.DataType.INT64: torch.int64, trt.DataType.BOOL: torch.bool,
    }  # fmt: skip
    if dtype not in types:
        raise UserError(f"{file.path}: has a tensor of type {dtype}, which PyTorch has not")
    return types[dtype]
