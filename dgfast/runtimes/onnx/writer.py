"""A pure function as an ONNX model, its input gradient included: trace, lower, and write each operation down.

Where the batch size is to stay open, the function is traced for two of them: what differs is a multiple of the batch.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from traceback import walk_stack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.graph.calls import modules_entered, named, source_line
from dgfast.graph.lower import lower
from dgfast.graph.nodes import constant
from dgfast.graph.trace import trace
from dgfast.ops import kernels
from dgfast.runtimes.onnx.fused import OPERATORS, take_in_sums
from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.operations import TABLE, NoFormError, Out
from dgfast.runtimes.onnx.simpler import decompositions
from dgfast.runtimes.onnx.values import NUMPY, STATISTIC, Batch, Dim, Value

OLDEST_OPSET = 18  # the first in which sums take their axes as an input
_ONE_SIZE = "export it for one batch size"
_BATCHES = 2, 3  # for an open batch; 1 would be taken for a size that broadcasts


@kernels("reference")  # no file can hold another
def convert(
    function: Function,
    example: dict[str, Tensor],
    outputs: Sequence[str],
    *,
    dynamic: bool | Collection[str] = False,
    double: bool = False,
    opset: int = OLDEST_OPSET,
    rank_4: bool = False,
    fused: bool = False,
) -> Any:
    """The `onnx.ModelProto` of `function`: no local functions, no training operations, default domain unless `fused`.

    Its metadata say for which `batch` it is, and the `dtype` of its products.

    Args:
        example: its arguments by name. Values do not matter. The first that has sizes has the batch as its first one.
        outputs: names of its results.
        dynamic: leave the batch size open: the first size of the arguments of these names, or (True) of every argument
            whose first size is the example's batch.
        double, rank_4, fused: see `OnnxGraph`.

    Raises:
        UserError: the function does not trace, has an operation that is not in the table (its module is named), or
            opset is too old.
    """
    if opset < OLDEST_OPSET:
        raise UserError(f"opset {opset} is too old: dgfast writes {OLDEST_OPSET} and newer")
    batch = next((len(x) for x in example.values() if x.dim()), 1)
    varied = [name for name, x in example.items() if x.dim() and len(x) == batch] if dynamic is True else dynamic or ()
    examples = [_resized(example, varied, size) for size in _BATCHES] if dynamic else [example]
    graphs = [_lowered(function, tuple(e.values())) for e in examples]
    graph = OnnxGraph(rank_4, fused, double)
    results = _Writer(graph, graphs[0], graphs[-1], function, examples[0]).write(list(example))
    return _model(graph, results, outputs, opset, "dynamic" if dynamic else str(batch))


def operations(model: Any) -> Counter[str]:
    """How many nodes of each kind."""
    return Counter(node.op_type for node in model.graph.node)


def _resized(example: dict[str, Tensor], varied: Collection[str], size: int) -> dict[str, Tensor]:
    return {name: x[:1].expand(size, *x.shape[1:]).clone() if name in varied else x for name, x in example.items()}


def _lowered(function: Function, example: tuple[Tensor, ...]) -> GraphModule:
    with sdpa_kernel(SDPBackend.MATH):  # a softmax between two matrix products, not a fused kernel
        return lower(trace(function, example), example, decompositions=decompositions())


class _Writer:
    """Walks one lowered graph, or two of different batch sizes at once."""

    def __init__(
        self, graph: OnnxGraph, one: GraphModule, other: GraphModule, function: Function, example: dict[str, Tensor]
    ) -> None:
        self.graph, self.one, self.other = graph, one, other
        self.function, self.example = function, example
        self.values: dict[Node, Any] = {}

    def write(self, names: list[str]) -> list[Value]:
        """Record everything; the results."""
        remaining = iter(names)
        for node, twin in self._pairs():
            if node.op == "placeholder":
                out = self._out(node, twin)
                self.values[node] = self.graph.input(next(remaining), out.shape, out.dtype)
            elif node.op == "get_attr":
                self.values[node] = self._constant(constant(self.one, node), constant(self.other, twin))
            elif node.op == "output":
                results: Any = node.args[0]
                return [self.values[result] for result in results]
            else:
                self.values[node] = self._call(node, twin)
        raise AssertionError("a graph without results")

    def _pairs(self) -> Iterator[tuple[Node, Node]]:
        """Each operation with the one that it is at the other batch size."""
        nodes, twins = list(self.one.graph.nodes), list(self.other.graph.nodes)
        if [(n.op, n.target) for n in nodes if n.op != "get_attr"] != [
            (n.op, n.target) for n in twins if n.op != "get_attr"
        ] or len(nodes) != len(twins):
            raise UserError(f"its operations are others at another batch size: {_ONE_SIZE}")
        return zip(nodes, twins, strict=True)

    def _constant(self, value: Tensor, twin: Tensor) -> Value:
        if value.dtype not in NUMPY:
            raise UserError(f"cannot export a constant of type {str(value.dtype).removeprefix('torch.')}")
        if value.shape == twin.shape:
            return self.graph.constant(value.cpu().numpy())
        sizes = _sizes(value.shape, twin.shape)
        one = value
        for dim, size in enumerate(sizes):  # repeated along the batch, as everything is that depends on weights alone
            one = one.narrow(dim, 0, 1) if isinstance(size, Batch) else one
        if not torch.equal(one.expand(twin.shape), twin):
            raise UserError(f"a constant of shape {list(value.shape)} depends on the batch: {_ONE_SIZE}")
        return self.graph.expand(self.graph.constant(one.cpu().numpy()), sizes)

    def _call(self, node: Node, twin: Node) -> Any:
        arguments, keywords = self._merge(node.args, twin.args), self._merge(node.kwargs, twin.kwargs)
        if "getitem" in str(node.target):
            return arguments[0][arguments[1]]
        try:
            if node.target not in TABLE:
                raise NoFormError("the table of operations does not have it")
            return TABLE[node.target](self.graph, self._out(node, twin), *arguments, **_meant(keywords))
        except NoFormError as error:
            where = _caller_of(node.target, self.function, tuple(self.example.values()))
            raise UserError(f"cannot export {node.target}, called by {where}: {error}") from error

    def _out(self, node: Node, twin: Node) -> Out:
        value, other = node.meta["val"], twin.meta["val"]
        if isinstance(value, list | tuple):
            value, other = value[0], other[0]
        read = {user.args[1] for user in node.users if "getitem" in str(user.target)}
        if value.dtype not in NUMPY:
            raise NoFormError(f"a result of type {str(value.dtype).removeprefix('torch.')}")
        return Out((_sizes(value.shape, other.shape), self.graph.kind(value.dtype), read))

    def _merge(self, one: Any, other: Any) -> Any:
        if isinstance(one, Node):
            return self.values[one]
        if isinstance(one, list | tuple):
            return [self._merge(a, b) for a, b in zip(one, other, strict=True)]
        if isinstance(one, dict):
            return {key: self._merge(value, other[key]) for key, value in one.items()}
        if isinstance(one, float) and one != other and one == one:
            raise UserError(f"a number depends on the batch, {one:g} and {other:g}: {_ONE_SIZE}")
        return _size(one, other) if isinstance(one, int) and one != other else one


def _meant(keywords: dict[str, Any]) -> dict[str, Any]:
    """Without what says where and how torch keeps a tensor."""
    return {k: v for k, v in keywords.items() if k not in ("dtype", "device", "pin_memory", "layout", "memory_format")}


def _size(one: int, other: int) -> Dim:
    times = other - one
    if times and one != times * _BATCHES[0]:
        raise UserError(f"a size that is no multiple of the batch: {_ONE_SIZE}")
    return Batch(times) if times else one


def _sizes(one: Sequence[int], other: Sequence[int]) -> tuple[Dim, ...]:
    return tuple(_size(a, b) for a, b in zip(one, other, strict=True))


# Whose operation it was -----------------------------------------------------------------------------------------------
class _Caller(TorchDispatchMode):
    """Finds the module in whose forward an operation is called, and the line of source."""

    def __init__(self, target: Any, entered: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._target, self._entered, self.found = target, entered, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._target and not self.found:
            line = source_line(reversed(list(walk_stack(None))))
            self.found = (named(self._entered) or "no module") + (f" at {line}" if line else "")
        return func(*args, **(kwargs or {}))


def _caller_of(target: Any, function: Function, example: tuple[Tensor, ...]) -> str:
    with modules_entered() as entered, _Caller(target, entered) as caller:
        function(*example)
    return caller.found or "the gradient of the function"


# ONNX's own types -----------------------------------------------------------------------------------------------------
def _model(graph: OnnxGraph, results: Sequence[Value], outputs: Sequence[str], opset: int, batch: str) -> Any:
    from onnx import helper, numpy_helper

    named = [graph.unary("Identity", value, name=name) for value, name in zip(results, outputs, strict=True)]
    if graph.fused:
        take_in_sums(graph, named)
    records, constants = graph.live(named)
    final = {value.name: name for value, name in zip(named, outputs, strict=True)}
    nodes = []
    for i, record in enumerate(records):
        attributes = {k: _attribute(v) for k, v in record.attributes.items() if record.op != "Identity"}
        written = [final.get(name, name) for name in record.outputs]
        domain = OPERATORS.get(record.op, "")
        name = f"{STATISTIC if graph.statistics.intersection(record.outputs) else ''}{record.op}_{i}"
        nodes.append(helper.make_node(record.op, record.inputs, written, name, domain=domain, **attributes))

    def info(name: str, value: Value) -> Any:
        if any(isinstance(size, Batch) and size.times != 1 for size in value.shape):
            raise UserError(f"{name} has a size that is a multiple of the batch: {_ONE_SIZE}")
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
        return helper.make_tensor_value_info(name, kind, ["batch" if isinstance(d, Batch) else d for d in value.shape])

    proto = helper.make_graph(
        nodes,
        "dgfast",
        [info(value.name, value) for value in graph.inputs],
        [info(name, value) for name, value in zip(outputs, named, strict=True)],
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in {node.domain for node in nodes} - {""}]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10, producer_name="dgfast")
    half = any(graph.constants[name].dtype == np.float16 for name in constants)
    helper.set_model_props(model, {"batch": batch, "dtype": "fp16" if half else "float32"})
    for name in constants:  # last, and each given up: the helpers copy what they are given, and it may be gigabytes
        model.graph.initializer.append(numpy_helper.from_array(graph.constants.pop(name), name))
    return model


def _attribute(value: Any) -> Any:
    """A numpy type as ONNX's number for it; anything else as it is."""
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
