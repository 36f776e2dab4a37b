"""python -m benchmarks.studies.floor: what a call must compute and move, and the least time that takes. Needs no GPU.

Counted in the lowered graph. What is pointwise stands in no row, for it is fused with what it follows; nor do sums over
channels that the network writes by hand, as EDM2's.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import click
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from benchmarks.subjects import guided_function, guided_levels, noise_at
from benchmarks.tables import table
from benchmarks.workloads import WORKLOADS, Workload
from dgfast.graph.cache import lowered

aten = torch.ops.aten

_BATCH = 2  # of the graph in which everything is counted
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_COPIES = (aten.cat, aten.stack, aten.clone)
_NORMS = {
    aten.native_group_norm: "normalisation", aten.native_group_norm_backward: "normalisation, gradient",
    aten.native_layer_norm: "normalisation", aten.native_layer_norm_backward: "normalisation, gradient",
}  # fmt: skip
_ABOVE_ZERO = click.FloatRange(min=0, min_open=True)


@dataclass
class Cost:
    """Of all calls of one kind: operations, and elements that are read or written."""

    calls: int = 0
    flops: int = 0
    elements: int = 0

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.calls - other.calls, self.flops - other.flops, self.elements - other.elements)


@click.command(help=__doc__)
@click.option("--workload", default="edm-cifar10", show_default=True, type=click.Choice(list(WORKLOADS)))
@click.option("--batch", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--tflops", default=790.0, show_default=True, type=_ABOVE_ZERO, help="matrix products; an H200's in bf16")
@click.option("--bandwidth", default=4.8, show_default=True, type=_ABOVE_ZERO, help="of memory, TB/s")
@click.option("--itemsize", default=2, show_default=True, type=click.IntRange(min=1), help="bytes a number")
def main(workload: str, batch: int, tflops: float, bandwidth: float, itemsize: int) -> None:
    made = WORKLOADS[workload]()
    guided, unguided = (costs(made, is_guided) for is_guided in (True, False))
    added = {kind: cost - unguided.get(kind, Cost()) for kind, cost in guided.items()}

    def show(title: str, kinds: Mapping[str, Cost]) -> None:
        rows, total = [], 0.0
        for kind, cost in kinds.items():
            moved = cost.elements * itemsize
            computing, moving = (1e3 * batch * at for at in (cost.flops / tflops / 1e12, moved / bandwidth / 1e12))
            total += max(computing, moving)
            figures = f"{cost.flops / 1e9:.2f}", f"{moved / 1e6:.1f}", f"{computing:.2f}", f"{moving:.2f}"
            rows.append([kind, str(cost.calls), *figures])
        header = ["calls", "GFLOP an image", "MB an image", "computing, ms", "moving, ms"]
        table([title, *header], [*rows, ["the larger of both", "", "", "", f"{total:.1f}", ""]])

    show(f"{workload}, batch {batch}, unguided", unguided)
    show("what guidance adds", {kind: cost for kind, cost in added.items() if cost.calls})


def costs(made: Workload, guided: bool) -> dict[str, Cost]:
    """What one image costs, by kind. A weight is read once a batch, and left out."""
    device = torch.device("cpu")
    networks = made.load(device, torch.float32)
    levels = guided_levels(made, networks, device)
    arguments = noise_at([levels[len(levels) // 2]] * _BATCH, networks, range(_BATCH), device)
    sums: dict[str, Cost] = defaultdict(Cost)
    for node in lowered(guided_function(made, networks, guided, device), arguments).graph.nodes:
        counted = _counted(node)
        if counted is not None:
            kind, flops = counted
            cost, images = sums[kind], [x for x in (node, *node.all_input_nodes) if x.op != "get_attr"]
            cost.calls += 1
            cost.flops += flops // _BATCH
            cost.elements += sum(_elements(x) for x in images) // _BATCH
    return dict(sorted(sums.items()))


def _counted(node: Node) -> tuple[str, int] | None:
    """The kind of an operation, and its multiplications and additions."""
    operation = getattr(node.target, "overloadpacket", None)
    sizes = [x.meta["val"].shape for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    if operation is aten.convolution:
        _, weight, *_ = sizes
        of_many = weight[2:].numel() > 1
        return "convolutions" if of_many else "linear layers", 2 * _elements(node) * weight[1:].numel()
    if operation in (aten.mm, aten.addmm, aten.bmm):
        return "linear layers", 2 * _elements(node) * sizes[-2][-1]
    if operation in (getattr(aten, _ATTENTION), getattr(aten, _ATTENTION + "_backward")):
        back = operation is not getattr(aten, _ATTENTION)  # then the result's gradient comes first
        queries, keys = sizes[back], sizes[back + 1]
        kind, products = ("attention, gradient", 5) if back else ("attention", 2)
        return kind, 2 * products * queries.numel() * keys[2]
    if operation in _NORMS:
        return _NORMS[operation], 0
    return ("copies", 0) if operation in _COPIES else None


def _elements(node: Node) -> int:
    return sum(x.numel() for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor))


if __name__ == "__main__":
    main()
