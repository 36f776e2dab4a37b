"""What benchmarks/gpu.py measures: a function a part, each with its estimate, the most interesting first.

A part yields its rows. What comes before it yields None may run beside all others: compiling, and whatever takes no
times. From there on it has the machine for itself.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import by_noise_level, engines, golden, operations
from benchmarks.cuda_noise import cuda_noise
from benchmarks.lab import Case, Lab
from benchmarks.machine import facts
from benchmarks.measure import PRECISIONS, Call, matmul_ceiling, precision, relative_error, synchronised
from benchmarks.part import Part, Rows, Setting
from benchmarks.processes import REPOSITORY, write_rows
from benchmarks.runtimes import RUNTIMES
from benchmarks.subjects import SAMPLER, guided_function, guided_levels, noise_at
from benchmarks.tables import Row
from benchmarks.workloads import WORKLOADS
from dgfast import ops
from dgfast.devices import pick_device
from dgfast.graph import Function
from dgfast.graph.cache import lowered
from dgfast.runtimes.cuda.build import by_inductor
from dgfast.runtimes.cuda.capture import capture
from dgfast.runtimes.cuda.streams import concurrent, split

_COMPILED = "test_aot.py"  # of Triton's compiler alone, which needs no GPU


def environment(at: Setting) -> Rows:
    """The machine, the versions, and the fastest matrix product in every number format."""
    yield None
    yield from ({"fact": name, "value": str(value)} for name, value in facts(at.device).items())
    for name in PRECISIONS if at.device.type == "cuda" else ("float32", "bf16"):
        yield {"matrix product": name, "TFLOP/s": matmul_ceiling(at.device, name, 0 if at.small else 0.5) / 1e12}


def kernels_right(at: Setting) -> Rows:
    """The kernels' own tests, a process a file: most of the time is Triton's, which compiles on one core."""
    folder = REPOSITORY / "tests" / "kernels"
    every = sorted(path for path in folder.glob("test_*.py") if path.name != _COMPILED)
    paths = [folder / "test_references.py"] if at.small else every
    # The tests ask for deterministic algorithms, for which cuBLAS wants this; no speed is measured with it.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", str(path)]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    failures = []
    with ThreadPoolExecutor() as pool:
        for path, done in zip(paths, pool.map(run, paths), strict=True):
            lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["said nothing"]
            wrong = [line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))]
            yield from ({"file": path.name, "tests": line} for line in [*wrong, lines[-1]])
            if done.returncode:
                failures.append(done.stdout + done.stderr)
    if failures:
        raise SystemExit("\n".join(failures))


def command_line(at: Setting) -> Rows:
    """`sample` as a user calls it: does every way run, how long does it take, and does it draw the same?"""
    brief = ["--seeds", "0-1", "--steps", "2", "--dg-weight", "0"] if at.small else []
    with tempfile.TemporaryDirectory() as folder:

        def draw(name: str, *options: str) -> Row:
            out = Path(folder, name)
            command = [sys.executable, "-m", "dgfast.sample", "--device", str(at.device), "--out", str(out), *options]
            began = time.perf_counter()
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            said = (done.stderr.strip().splitlines() or [""])[-1]
            return {
                "sample": name, "options": " ".join(options), "seconds": time.perf_counter() - began,
                "ended": "ok" if done.returncode == 0 else f"exit code {done.returncode}: {said}",
                "grey levels off eager": _grey_levels(Path(folder, "eager"), out) if "--compile" in options else "",
            }  # fmt: skip

        yield draw("eager", *brief)
        yield draw("compiled", "--compile", *brief)
        yield draw("one step", "--one-step", *brief[:2])
        yield draw("bf16", "--dtype", "bf16", *brief)
        yield None
        yield draw("compiled again", "--compile", *brief)


def _grey_levels(one: Path, other: Path) -> str:
    """How far the images of two folders are apart at most; empty where there are none to compare."""
    images = [[np.load(file)["images"] for file in sorted(folder.glob("images-*.npz"))] for folder in (one, other)]
    if not all(images):
        return ""
    a, b = (np.concatenate(files).astype(int) for files in images)
    return str(abs(a - b).max())


def golden_networks(at: Setting, runtime: str) -> Rows:
    """The networks of the golden files on the device against eager on the CPU, which the tests hold to the files."""
    paths = golden.FOLDER.glob("dit_small*.npz" if at.small else "*.npz")
    with precision("float32"):
        for name, millions, errors in golden.errors(sorted(paths), {runtime: RUNTIMES[runtime]}, at.device):
            allowed = RUNTIMES[runtime].tolerance
            verdict = "ok" if errors[runtime] <= allowed else "WRONG"
            yield {"golden file": name, "million weights": millions, "error": errors[runtime], runtime: verdict}


def sampler(at: Setting, batch: int, name: str, profiled: bool) -> Rows:
    """A whole run, from seeds to images, with guidance and without; held against eager float32 before it is timed."""
    lab, case = Lab(at.device, 0 if at.small else 0.5), Case(at.workload, at.runtime, at.batch(batch), name)
    with precision(name):
        guided, unguided = (lab.prepared(SAMPLER, case, is_guided) for is_guided in (True, False))
        error, allowed = lab.gate(SAMPLER, case, guided=True)
        per_image = lab.flops(SAMPLER, case.workload, True)
        yield None
        slow, fast = (at.milliseconds(prepared.call, 3) for prepared in (guided, unguided))
        achieved = case.batch * per_image / slow / 1e9
        yield {
            "sampler": case.name(in_full=True), "ms": slow, "images/s": 1e3 * case.batch / slow, "TFLOP/s": achieved,
            "of ceiling": 1e12 * achieved / lab.ceiling(name), "guided / unguided": slow / fast, "error": error,
            "allowed": allowed, "compiled in, s": guided.seconds + unguided.seconds,
        }  # fmt: skip
        if profiled:
            yield from _profile(guided.call, at, case.name(in_full=True))


def _profile(call: Call, at: Setting, name: str) -> Iterator[Row]:
    """Where the time of a call goes; a trace for Perfetto lies in the folder."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if at.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        call()
    profiled.export_chrome_trace(str(at.out / f"{name}.trace.json.gz"))
    spent = attrgetter(f"self_{'device' if at.device.type == 'cuda' else 'cpu'}_time_total")
    events = sorted(profiled.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, events)) or 1.0  # where the profiler may not look at the GPU, it saw nothing
    for event in events[:20]:
        yield {"kernel": event.key, "ms": spent(event) / 1e3, "share": spent(event) / total, "calls": event.count}


def package(at: Setting) -> Rows:
    """One guided call compiled ahead of time, which is what `compiled` does on CUDA, and by torch.compile.

    With the kernels that were measured to be faster, and ahead of time with all that there are, too.
    """
    ready: list[tuple[Row, Call]] = []
    ways: list[tuple[str, ops.Choice]] = [*((name, "auto") for name in at.compilers), (at.compilers[0], "triton")]
    with precision("bf16"):
        for batch, (name, choice) in product(map(at.batch, (512, 1)), ways):
            with ops.kernels(choice):
                function, arguments = _guided_call(at, batch, "bf16")
                began = time.perf_counter()
                call = _waited(RUNTIMES[name].whole(function, arguments), arguments, at)
                call()
                first = time.perf_counter() - began
                _waited(RUNTIMES[name].build(function, arguments), arguments, at)()
                again = time.perf_counter() - began - first
            built: Row = {
                "guided call": name,
                "kernels": choice,
                "batch": batch,
                "built in, s": first,
                "again, s": again,
            }
            ready.append((built, call))
        yield None
        for known, call in ready:
            yield {**known, "ms": at.milliseconds(call, 30)}


def streams(at: Setting, batches: tuple[int, ...]) -> Rows:
    """One guided call in a CUDA graph: compiled whole, and its networks on a stream each."""
    ready: list[tuple[int, Call, Call]] = []
    with precision("bf16"), torch.no_grad():
        for batch in batches:
            function, arguments = _guided_call(at, at.batch(batch), "bf16")
            graph = lowered(function, arguments)
            if at.device.type == "cuda":
                ways = capture(by_inductor(graph), arguments), capture(concurrent(graph, _compiled), arguments)
            else:  # without streams: the same parts, one after another
                ways = graph, split(graph) or graph
            one, several = (_waited(way, arguments, at) for way in ways)
            ready.append((at.batch(batch), one, several))
        yield None
        for size, one, several in ready:
            error = relative_error(several(), one())
            whole, parted = (at.milliseconds(call, 30) for call in (one, several))
            yield {"batch": size, "one stream, ms": whole, "a stream each, ms": parted, "difference": error}


def kernels(at: Setting) -> Rows:
    """The operations of dgfast/ops.py in plain torch, by inductor and in Triton; one that fails hides no other."""
    ready: list[tuple[operations.KernelCase, Call]] = []
    for case in operations.cases(at.device, at.small):
        call = case.call()
        with suppress(Exception):  # said when it is measured
            call()
        ready.append((case, call))
    yield None
    for case, call in ready:
        try:
            yield _kernel(case, call, at)
        except Exception as error:
            yield {"kernel": case.name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _kernel(case: operations.KernelCase, call: Call, at: Setting) -> Row:
    """Its time, once it is known to be right."""
    results = call()
    error, allowed = operations.gate(case, results)
    moved = operations.bytes_moved(case.operation.arguments(), results)
    on_gpu = at.device.type == "cuda"
    spent = operations.device_seconds(call) if on_gpu else at.milliseconds(call, 30) / 1e3
    return {"kernel": case.name, "us": 1e6 * spent, "GB/s": moved / spent / 1e9, "error": error, "allowed": allowed}


def _compiled(part: nn.Module, *_: object) -> Function:
    return by_inductor(part)


def _guided_call(at: Setting, batch: int, name: str) -> tuple[Function, tuple[Tensor, Tensor, Tensor | None]]:
    """The guided denoiser in that number format, and noise at one of its levels."""
    workload = WORKLOADS[at.workload]()
    networks = workload.load(at.device, PRECISIONS[name])
    levels = guided_levels(workload, networks, at.device)
    arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), at.device)
    return guided_function(workload, networks, True, at.device), arguments


def _waited(function: Function, arguments: tuple[Tensor, Tensor, Tensor | None], at: Setting) -> Call:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return function(*arguments)

    return synchronised(call, at.device)


# A function of edm-cifar10 is about 250 core-seconds of work, one of mnist32 125: docs/performance.md has seconds
# of processes compiling beside one another on 16 cores, divided among them.
PARTS = {
    part.name: part
    for part in (
        Part("environment", environment, 0, 6),
        Part("kernels right", kernels_right, 135, 0),
        Part("command line", command_line, 260, 30),
        Part("noise of CUDA", cuda_noise, 0, 4, new=True),
        Part("golden networks", partial(golden_networks, runtime="eager"), 60, 0, new=True),
        Part("sampler, 512, bf16", partial(sampler, batch=512, name="bf16", profiled=True), 500, 22),
        Part("sampler, 1, bf16", partial(sampler, batch=1, name="bf16", profiled=True), 500, 6),
        Part("sampler, 512, tf32", partial(sampler, batch=512, name="tf32", profiled=False), 500, 20, new=True),
        Part("sampler, 1, tf32", partial(sampler, batch=1, name="tf32", profiled=False), 500, 4, new=True),
        Part("package against torch.compile", package, 840, 14, new=True),
        Part("two streams against one", partial(streams, batches=(1,)), 380, 4, new=True),
        Part("kernels against inductor", kernels, 170, 50, new=True),
        Part("ONNX Runtime", engines.onnx, 200, 90),
        Part("parity by noise level", by_noise_level.parity, 320, 0, new=True),
        Part("two streams, larger batches", partial(streams, batches=(8, 32, 64)), 1500, 10, new=True),
        Part("golden networks, compiled", partial(golden_networks, runtime="compiled"), 3000, 0, new=True),
        Part("TensorRT", engines.tensorrt, 200, 60, new=True),
    )
}
"""By name, in the order in which they are measured: where the time does not suffice, the last are left out."""


@click.command(help=__doc__)
@click.option("--part", "name", type=click.Choice(list(PARTS)), required=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--small", is_flag=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--rows", type=click.Path(path_type=Path), required=True, help="File for rows, JSON lines.")
@click.option("--ready", type=click.Path(path_type=Path), required=True, help="File to make when it wants its turn.")
def main(name: str, device: str, small: bool, out: Path, rows: Path, ready: Path) -> None:
    write_rows(PARTS[name].run(Setting(pick_device(device), small, out)), rows, ready)


if __name__ == "__main__":
    main()
