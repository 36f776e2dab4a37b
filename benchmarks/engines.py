"""Engine files against eager: python -m benchmarks.engines, a part of benchmarks/gpu.py.

The guided step as one ONNX file in ONNX Runtime, and as one TensorRT engine: how long it takes to make, how large it
is, how right and how fast. What is not installed, or does not run here, is a row that says so.
"""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.measure import precision, relative_error, seconds, synchronised
from benchmarks.parts import write
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.workloads import WORKLOADS, Workload
from dgfast.devices import pick_device
from dgfast.errors import UserError
from dgfast.ops import kernels
from dgfast.runtimes import RUNTIMES, Runtime
from dgfast.runtimes.onnx.file import files_of, save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt.builder import Options, build
from dgfast.runtimes.tensorrt.engine import load
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import find

_ROUNDS = 20
_COLUMNS = ("runtime", "precision", "batch", "status", "build s", "MB", "ms", "images/s", "error")

Inputs = dict[str, Tensor]
Runs = Callable[[Inputs], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Opened:
    """Something that runs a file, and what it took to get there."""

    run: Runs
    build_seconds: float
    megabytes: float


def _onnxruntime(model: Any, folder: Path, batches: tuple[int, ...], dtype: str, at: torch.device) -> Opened:
    path = folder / f"onnxruntime-{dtype}.onnx"
    save(model, path)
    began = time.perf_counter()
    engine = OnnxEngine(path, at)
    size = sum(file.stat().st_size for file in files_of(path))
    return Opened(engine, time.perf_counter() - began, size / 1e6)


def _tensorrt(model: Any, folder: Path, batches: tuple[int, ...], dtype: str, at: torch.device) -> Opened:
    flavor, trt = find()
    out = folder / f"tensorrt-{dtype}"
    out.mkdir()
    save(model, out / "model.onnx")
    sizes = sorted(batches)
    built = build(trt, flavor, out / "model.onnx", Options((sizes[0], sizes[len(sizes) // 2], sizes[-1])))
    digest = hashlib.sha256(built.plan).hexdigest()
    file = EngineFile(out, digest, flavor, trt.__version__, dtype, built.batch, 1.0)
    file.path.write_bytes(built.plan)
    file.write()
    return Opened(load(out, at), built.seconds, len(built.plan) / 1e6)


WAYS = {"onnx": (_onnxruntime, False), "tensorrt": (_tensorrt, True)}
"""How each runtime opens a model, and whether it must have images in four dimensions throughout."""


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--workload", "name", type=click.Choice(list(WORKLOADS)), required=True)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, required=True)
@click.option("--precision", "dtypes", type=click.Choice(["float32", "fp16"]), multiple=True, required=True)
def main(device: str, out: Path, name: str, batches: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    at, workload = pick_device(device), WORKLOADS[name]()
    cases = {batch: _case(workload, batch, at) for batch in batches}
    rows: list[list[str]] = []

    def say(*row: object) -> None:
        if not rows:
            click.echo(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
        rows.append([str(cell) for cell in row] + [""] * (len(_COLUMNS) - len(row)))
        click.echo(f"| {' | '.join(rows[-1])} |")
        write(out, {"workload": name, "columns": list(_COLUMNS), "rows": rows})

    truth = _eager(workload, at)
    for batch, inputs in cases.items():
        _row(say, "eager", "float32", batch, Opened(truth, 0.0, 0.0), inputs, truth, at)
    with tempfile.TemporaryDirectory() as folder:
        for way, (opens, rank_4) in WAYS.items():
            model = _attempt(say, way, "all", partial(_model, workload, RUNTIMES[way], rank_4, at))
            for dtype in dtypes if model is not None else ():
                chosen = _rounded(model, dtype)
                opened = _attempt(say, way, dtype, partial(opens, chosen, Path(folder), batches, dtype, at))
                for batch, inputs in cases.items() if opened is not None else ():
                    _row(say, way, dtype, batch, opened, inputs, truth, at)


def _case(workload: Workload, batch: int, at: torch.device) -> Inputs:
    """Noise, each image at another guided level."""
    networks = workload.load(torch.device("cpu"), torch.float32)
    levels = guided_levels(workload, networks, torch.device("cpu"))
    x, sigma, labels = noise_at([levels[k % len(levels)] for k in range(batch)], networks, range(batch), at)
    given = {"x": x.float(), "sigma": sigma.float(), "class_labels": labels}
    return {name: value for name, value in given.items() if value is not None}


def _eager(workload: Workload, at: torch.device) -> Runs:
    """The guided denoiser in eager float32, without TF32."""
    function = guided_function(workload, workload.load(at, torch.float32), True, at)

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad(), precision("float32"), kernels("reference"):
            results = function(inputs["x"], inputs["sigma"], inputs.get("class_labels"))
        return dict(zip(("denoised", "log_ratio"), results, strict=True))

    return run


def _model(workload: Workload, runtime: Runtime, rank_4: bool, at: torch.device) -> Any:
    """The ONNX model for every batch size; traced on the CPU, where it is not run.

    Raises:
        UserError: why nothing here would run it, or onnx is missing.
    """
    runtime.require(at)
    host = torch.device("cpu")
    function = guided_function(workload, workload.load(host, torch.float32), True, host)
    example = _case(workload, 2, host)

    def of_given(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, ...]:
        return function(x, sigma, class_labels)

    return convert(of_given, example, ("denoised", "log_ratio"), dynamic=True, rank_4=rank_4)


def _rounded(model: Any, dtype: str) -> Any:
    import onnx

    from dgfast.export.half_products import half_products

    if dtype == "float32":
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half_products(copy, dtype)
    return copy


def _attempt(say: Callable[..., None], way: str, dtype: str, make: Callable[[], Any]) -> Any:
    """What `make` makes; where it can't, a row that says why, and None."""
    try:
        return make()
    except UserError as error:
        say(way, dtype, "", f"missing: {' '.join(error.message.split())}")
    except Exception as error:  # a failure of one way must not hide the others
        say(way, dtype, "", f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return None


def _row(
    say: Callable[..., None], way: str, dtype: str, batch: int, opened: Opened, inputs: Inputs, truth: Runs,
    at: torch.device,
) -> None:  # fmt: skip
    def measure() -> tuple[float, float]:
        wanted, found = truth(inputs), opened.run(inputs)
        error = relative_error([found[name].to(value.device) for name, value in wanted.items()], list(wanted.values()))
        call = synchronised(lambda: list(opened.run(inputs).values()), at)
        call()
        return error, statistics.median(seconds(call) for _ in range(_ROUNDS))

    measured = _attempt(say, way, dtype, measure)
    if measured is not None:
        error, median = measured
        figures = (opened.build_seconds, opened.megabytes, 1e3 * median, batch / median)
        say(way, dtype, batch, "ok", *(f"{figure:.4g}" for figure in figures), f"{error:.1e}")


if __name__ == "__main__":
    main()
