"""Any function as a TensorRT engine, built here and now: what the benchmarks compare with other runtimes."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.export.engine_builder import Options
from dgfast.export.engine_builder import build as build_engine
from dgfast.runtimes.engine_file import EngineFile
from dgfast.runtimes.graph import Function
from dgfast.runtimes.onnx import save
from dgfast.runtimes.onnx_writer import convert
from dgfast.runtimes.tensorrt import load
from dgfast.runtimes.tensorrt_library import find


def build(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` as an engine for the shapes of `example`, in float32.

    Raises:
        UserError: the function can't be exported, there is no library, or it can't build or run here.
    """
    given = {f"input_{i}": x.float() for i, x in enumerate(example) if x is not None}

    def of_given(*arguments: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(arguments)
        return function(*(None if x is None else next(remaining) for x in example))

    with torch.no_grad():
        outputs = [f"output_{i}" for i in range(len(of_given(*(x[:1] for x in given.values()))))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "function.onnx")
        save(convert(of_given, given, outputs, rank_4=True), path)
        engine = load(_built(path, len(next(iter(given.values())))))

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [x for x in arguments if x is not None]
        return tuple(x.to(tensors[0].dtype) for x in engine(dict(zip(given, tensors, strict=True))).values())

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
