"""python -m benchmarks.studies.nodes: where the time of one call on a CPU goes, by the kind of code that is called.

Compiled, every node of the graph is called by itself; in ONNX Runtime, its profiler listens.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch.fx import GraphModule, Interpreter, Node

from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS, Workload
from dgfast import GuidanceConfig
from dgfast.devices import keep_freed_memory
from dgfast.graph.cache import lowered
from dgfast.runtimes.cpu import build as cpu

_ROUNDS = 7
_CPU = torch.device("cpu")
Seconds = dict[str, list[float]]
"""Kind of code -> the median of each of its calls."""


@click.command(help=__doc__)
@click.option("--workload", default="mnist32", show_default=True, type=click.Choice(list(WORKLOADS)))
@click.option("--runtime", default="compiled", show_default=True, type=click.Choice(["compiled", "onnx"]))
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="default: PyTorch's")
@click.option("--guided/--unguided", default=True, show_default=True)
def main(workload: str, runtime: str, batch: int, threads: int | None, guided: bool) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    keep_freed_memory()
    ways: dict[str, Callable[[Workload, int, bool], Seconds]] = {"compiled": _compiled, "onnx": _onnx}
    seconds = ways[runtime](WORKLOADS[workload](), batch, guided)
    total = sum(map(sum, seconds.values()))
    ordered = sorted(seconds.items(), key=lambda item: -sum(item[1]))
    rows = [[kind, str(len(s)), f"{1e3 * sum(s):.2f}", f"{sum(s) / total:.1%}"] for kind, s in ordered]
    table(
        [f"{workload}, {runtime}, batch {batch}", "calls", "ms", "share"],
        [*rows, ["all", "", f"{1e3 * total:.1f}", ""]],
    )


def _compiled(made: Workload, batch: int, guided: bool) -> Seconds:
    networks = made.load(_CPU, torch.float32)
    levels = guided_levels(made, networks, _CPU)
    arguments = noise_at([levels[len(levels) // 2]] * batch, networks, range(batch), _CPU)
    graph = lowered(guided_function(made, networks, guided, _CPU), arguments)
    timer = _Timer(cpu.compile(graph, batch))
    with torch.no_grad():
        for _ in range(_ROUNDS):
            timer.run(*arguments)
    seconds: Seconds = defaultdict(list)
    for node, spent in timer.seconds.items():
        seconds[timer.kind(node)].append(median(spent))
    return seconds


class _Timer(Interpreter):
    """Runs a graph node by node, and takes the time of each."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[Node, list[float]] = defaultdict(list)

    def run_node(self, node: Node) -> Any:
        began = time.perf_counter()
        result = super().run_node(node)
        self.seconds[node].append(time.perf_counter() - began)
        return result

    def kind(self, node: Node) -> str:
        """The class of a module, or the operation of a library; what computes nothing is one kind."""
        if node.op == "call_module":
            return self.fetch_attr(str(node.target))._get_name().lstrip("_")
        computes = isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view
        return str(node.target) if computes else "views, parameters, results"


def _onnx(made: Workload, batch: int, guided: bool) -> Seconds:
    import onnxruntime

    from dgfast.export.joint_graph import joint
    from dgfast.runtimes.onnx.file import save
    from dgfast.runtimes.onnx.writer import convert

    guidance = made.guidance if guided else GuidanceConfig()
    subject = joint(made.load(_CPU, torch.float32), made.sampling, guidance, "denoiser")
    inputs = dict(subject.case("", [1.0] * batch, seed=0).inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "function.onnx"
        save(convert(subject.function, inputs, subject.outputs), path)
        options.profile_file_prefix = str(path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        taken = {value.name: value.type for value in session.get_inputs()}
        feeds = {name: inputs[name].float().numpy() for name in taken}
        for _ in range(_ROUNDS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e6)
    seconds: Seconds = defaultdict(list)
    for (operation, _), times in spent.items():
        seconds[operation].append(median(times))
    return seconds


if __name__ == "__main__":
    main()
