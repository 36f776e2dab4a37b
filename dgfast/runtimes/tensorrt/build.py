"""A pure function as a TensorRT engine, built here and now and kept nowhere."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.runtimes.onnx.build import named
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt.builder import Options
from dgfast.runtimes.tensorrt.builder import build as build_engine
from dgfast.runtimes.tensorrt.engine import load
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import find


def require(device: torch.device) -> None:
    """
    Raises:
        UserError: there can be no TensorRT engine on that device: not CUDA, no library, or none for this GPU.
    """
    if device.type != "cuda":
        raise UserError("TensorRT runs on CUDA only")
    flavor, _ = find()
    if flavor == "tensorrt-rtx" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        raise UserError("TensorRT for RTX does not support this GPU")


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` as an engine for the shapes of `example`, in float32.

    Raises:
        UserError: the function can't be exported, there is no library, or it can't build or run here.
    """
    of_tensors, inputs, outputs = named(function, example)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "function.onnx")
        save(convert(of_tensors, inputs, outputs, rank_4=True), path)
        engine = load(_built(path, len(next(iter(inputs.values())))))

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [x for x in arguments if x is not None]
        return tuple(x.to(tensors[0].dtype) for x in engine(dict(zip(inputs, tensors, strict=True))).values())

    return run


def _built(onnx: Path, batch: int) -> Path:
    """The folder of the engine, beside the ONNX file."""
    flavor, trt = find()
    built = build_engine(trt, flavor, onnx, Options((batch, batch, batch)))
    if built.obstacles:
        raise UserError(f"{trt.__name__} builds engines here, but they can't run: {'; '.join(built.obstacles)}")
    file = EngineFile(
        onnx.parent, hashlib.sha256(built.plan).hexdigest(), flavor, trt.__version__, "float32", built.batch, 1e-4
    )
    file.path.write_bytes(built.plan)
    file.write()
    return onnx.parent
