"""The guided step in exported files against eager, parts of benchmarks/gpu.py: ONNX Runtime's options, and TensorRT.

What is not installed, or does not run here, is a row that says so.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import precision, relative_error, synchronised
from benchmarks.part import Rows, Setting
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.tables import Row
from benchmarks.workloads import WORKLOADS
from dgfast.export.half_products import half_products, wide_products
from dgfast.export.written_out import written_out
from dgfast.ops import kernels
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.onnx.cuda import CudaOptions
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt.builder import Options, build
from dgfast.runtimes.tensorrt.engine import load
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import find

Runs = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
_HOST = torch.device("cpu")
_PLAIN, _HALF = CudaOptions(graph=False), CudaOptions(graph=False, tensor_cores=True)


@dataclass(frozen=True)
class Variant:
    """One way to have ONNX Runtime's CUDA provider execute the step.

    Attributes:
        fused: normalisations are its own operators. new: it never ran on a GPU.
    """

    name: str
    dtype: str
    cuda: CudaOptions
    fused: bool = False
    new: bool = True


VARIANTS = (
    Variant("float32", "float32", _PLAIN, new=False),
    Variant("float32, CUDA graph", "float32", CudaOptions()),
    Variant("fp16 without tensor cores", "fp16", _PLAIN, new=False),
    Variant("fp16", "fp16", _HALF),
    Variant("fp16, CUDA graph", "fp16", CudaOptions(tensor_cores=True)),
    Variant("fp16, channels last", "fp16", CudaOptions(graph=False, nhwc=True, tensor_cores=True)),
    Variant("fp16, heuristic choice", "fp16", CudaOptions(graph=False, search="HEURISTIC", tensor_cores=True)),
    Variant("fp16, channels last, fused", "fp16", CudaOptions(graph=False, nhwc=True, tensor_cores=True), fused=True),
    Variant("fp16, all of it", "fp16", CudaOptions(nhwc=True, tensor_cores=True), fused=True),
)


def onnx(at: Setting) -> Rows:
    """Each variant at batch 1 and 512, on a file of that batch alone."""
    missing = RUNTIMES["onnx"].missing(at.device)
    if missing is not None:
        yield {"ONNX Runtime": f"skipped: {missing}"}
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict.fromkeys(at.batch(size) for size in (1, 512))
        files = {
            (size, fused, dtype): path
            for size in sizes for fused in (False, True) for dtype, path in _files(at, size, fused, Path(folder))
        }  # fmt: skip
        yield None
        for size in sizes:
            yield {"step": "eager", "batch": size, **_measured(_eager(at), 0.0, size, at), "on a GPU": ""}
            for variant in VARIANTS:
                path = files[size, variant.fused, variant.dtype]
                opens = partial(OnnxEngine, path, at.device, cuda=variant.cuda)
                figures = _attempt(partial(_run, opens, size, at))
                yield {"step": variant.name, "batch": size, **figures, "on a GPU": "never before" * variant.new}


def tensorrt(at: Setting) -> Rows:
    """One engine for all batches, in float32 and in fp16."""
    missing = RUNTIMES["tensorrt"].missing(at.device)
    if missing is not None:
        yield {"TensorRT": f"skipped: {missing}"}
        return
    with tempfile.TemporaryDirectory() as folder:
        model = _model(at, 2, rank_4=True, dynamic=True)
        ready = {dtype: _attempt(partial(_engine, model, dtype, Path(folder), at)) for dtype in ("float32", "fp16")}
        yield None
        for dtype, engine in ready.items():
            for size in dict.fromkeys(at.batch(size) for size in (1, 64, 512)):
                figures = engine if isinstance(engine, dict) else _attempt(partial(_measured, engine, 0.0, size, at))
                yield {"step": f"TensorRT {dtype}", "batch": size, **figures}


def _model(at: Setting, batch: int, **options: bool) -> Any:
    """The guided step as an ONNX model, traced on the CPU, where it is not run."""
    workload = WORKLOADS[at.workload]()
    function = guided_function(workload, workload.load(_HOST, torch.float32), True, _HOST)

    def of_tensors(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, ...]:
        return function(x, sigma, class_labels)

    return convert(of_tensors, _inputs(at, batch, _HOST), ("denoised", "log_ratio"), **options)


def _files(at: Setting, batch: int, fused: bool, folder: Path) -> Iterator[tuple[str, Path]]:
    """The step in either number format; the second is made of the first."""
    model = _model(at, batch, fused=fused)
    if fused and at.device.type == "cpu":
        written_out(model)  # the CPU provider has no kernels for these operators
    for dtype in ("float32", "fp16"):
        if dtype != "float32":
            half_products(model, dtype)
            wide_products(model)
        path = folder / f"{batch}-{'fused-' * fused}{dtype}.onnx"
        save(model, path)
        yield dtype, path


def _engine(model: Any, dtype: str, folder: Path, at: Setting) -> Any:
    """The model built and opened; in fp16 its products are rounded, which leaves it so."""
    flavor, trt = find()
    out = folder / dtype
    out.mkdir()
    if dtype != "float32":
        half_products(model, dtype)
    save(model, out / "model.onnx")
    built = build(trt, flavor, out / "model.onnx", Options((1, 64, 512)))
    digest = hashlib.sha256(built.plan).hexdigest()
    file = EngineFile(out, digest, flavor, trt.__version__, dtype, built.batch, 1.0)
    file.path.write_bytes(built.plan)
    file.write()
    return load(out, at.device)


@cache
def _inputs(at: Setting, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Noise, each image at another guided level."""
    workload = WORKLOADS[at.workload]()
    networks = workload.load(_HOST, torch.float32)
    levels = guided_levels(workload, networks, _HOST)
    x, sigma, labels = noise_at([levels[k % len(levels)] for k in range(batch)], networks, range(batch), device)
    tensors = {"x": x.float(), "sigma": sigma.float(), "class_labels": labels}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@cache
def _eager(at: Setting) -> Runs:
    """The guided denoiser in eager float32, without TF32."""
    workload = WORKLOADS[at.workload]()
    function = guided_function(workload, workload.load(at.device, torch.float32), True, at.device)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), precision("float32"), kernels("reference"):
            results = function(inputs["x"], inputs["sigma"], inputs.get("class_labels"))
        return dict(zip(("denoised", "log_ratio"), results, strict=True))

    return run


def _run(opens: Callable[[], Runs], batch: int, at: Setting) -> Row:
    began = time.perf_counter()
    engine = opens()
    return _measured(engine, time.perf_counter() - began, batch, at)


def _measured(run: Runs, opening: float, batch: int, at: Setting) -> Row:
    inputs = _inputs(at, batch, at.device)
    exact, results = _eager(at)(inputs), run(inputs)
    error = relative_error([results[name].to(value.device) for name, value in exact.items()], list(exact.values()))
    taken = at.milliseconds(synchronised(lambda: list(run(inputs).values()), at.device), 10)
    return {"opened in, s": opening, "ms": taken, "images/s": 1e3 * batch / taken, "error": error, "ended": "ok"}


def _attempt(make: Callable[[], Any]) -> Any:
    """What it makes; where it can't, cells that say why: a failure of one way must not hide the others."""
    try:
        return make()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {"opened in, s": "", "ms": "", "images/s": "", "error": "", "ended": reason}
