"""python -m benchmarks.studies.exporters: dgfast's ONNX writer against PyTorch's exporter, on one guided call.

PyTorch's cannot trace a function with a gradient inside, so both get the graph that dgfast has traced and lowered.
"""

import time
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import relative_error
from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS
from dgfast.extras import require
from dgfast.graph import Function
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.runtimes.onnx.build import named
from dgfast.runtimes.onnx.writer import convert

_CPU = torch.device("cpu")
aten = torch.ops.aten


@click.command(help=__doc__)
@click.option("--workload", "name", default="mnist32", show_default=True, type=click.Choice(list(WORKLOADS)))
@click.option("--batch", default=2, show_default=True, type=click.IntRange(min=1))
def main(name: str, batch: int) -> None:
    require("onnx", "onnxruntime", "onnxscript")
    workload = WORKLOADS[name]()
    networks = workload.load(_CPU, torch.float32)
    levels = guided_levels(workload, networks, _CPU)
    arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), _CPU)
    function, example, outputs = named(guided_function(workload, networks, True, _CPU), arguments)
    exact = function(*example.values())
    rows = []
    exporters = {
        "dgfast": partial(convert, function, example, outputs),
        "PyTorch": partial(_by_pytorch, function, example),
    }
    for exporter, export in exporters.items():
        began = time.perf_counter()
        model = export()
        seconds = time.perf_counter() - began
        error = relative_error(_run(model, example), exact)
        rows.append([exporter, str(len(model.graph.node)), f"{seconds:.0f} s", f"{error:.1e}"])
    table([f"{name}, batch {batch}", "nodes", "written in", "largest error"], rows)


def _spread(gradient: Tensor, x: Tensor, kernel: list[int], *rest: object) -> Tensor:
    """The input gradient of mean pooling over kernels side by side, the only one that networks here have."""
    rows = gradient.repeat_interleave(kernel[0], 2).repeat_interleave(kernel[1], 3)
    return rows / (kernel[0] * kernel[1])


def _by_pytorch(function: Function, example: dict[str, Tensor]) -> Any:
    arguments = tuple(example.values())
    with sdpa_kernel(SDPBackend.MATH):  # it has no form for the fused kernels' gradients
        decompositions = {**core_aten_decompositions(), aten.avg_pool2d_backward.default: _spread}
        graph = lower(trace(function, arguments), arguments, decompositions=decompositions)
    program = torch.onnx.export(graph, arguments, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def _run(model: Any, example: dict[str, Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = zip(session.get_inputs(), example.values(), strict=True)
    return list(map(torch.from_numpy, session.run(None, {entry.name: x.numpy() for entry, x in inputs})))


if __name__ == "__main__":
    main()
