"""Lowered graphs kept across runs: a second run reads the graph that the first one traced.

A graph is kept as JSON, before what depends on weights alone is folded, under the name of all that its trace depends on
(see `key`). Weights are not kept: the graph says which of the function's own tensors it reads. Whatever has no
name, or no form in JSON, is not kept, and what cannot be read is traced anew.
"""

import json
import operator
from base64 import b64decode, b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from dgfast import ops
from dgfast.graph import Function
from dgfast.graph.cache_folder import cache_folder
from dgfast.graph.environment import environment
from dgfast.graph.key import NamelessError, digest, written
from dgfast.graph.lower import fold_constants, unfolded
from dgfast.graph.nodes import constant, copy_constants
from dgfast.graph.trace import trace

NAME = "name"
"""Where `lowered` leaves the graph's name, in its `meta`: None, if it has none and nothing made of it may be kept."""

_NAMESPACES = ("aten", "prims", "dgfast")
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}  # as torch.<name>
_MOST_BYTES = 4 << 20  # of constants that are not the function's own tensors


def lowered(function: Function, example: Sequence[Tensor | None]) -> GraphModule:
    """`function` traced and lowered channels-last for the shapes of `example`, or read from an earlier run's file.

    Its weights are those of the networks, where they lie; copies, if the function says that it has `own_weights`.

    Raises:
        UserError: as `trace.trace`.
    """
    path, tensors = _named(function, example)
    graph = _read(path, tensors) if path else None
    if graph is None:
        graph = unfolded(trace(function, example), example, channels_last=True)
        if path:
            _keep(path, graph, tensors)
    fold_constants(graph)
    if getattr(function, "own_weights", False):
        copy_constants(graph)
    graph.meta[NAME] = path and path.stem
    return graph


def _named(function: Function, example: Sequence[Tensor | None]) -> tuple[Path | None, list[Tensor]]:
    """The file of the graph, None if it has no name, and the tensors among which the graph's weights are."""
    try:
        text, tensors = written(function)
        forms = [None if x is None else _argument_form(x, example, tensors) for x in example]
        name = digest(text, tensors, forms, environment(next(x.device for x in example if x is not None)))
        return cache_folder("graphs") / f"{name}.json", tensors
    except NamelessError:
        return None, []


def _argument_form(x: Tensor, example: Sequence[Tensor | None], tensors: list[Tensor]) -> list[Any]:
    """All that a trace sees of an argument: not its values, but whether it is another argument too."""
    if type(x) is not Tensor or any(x is y for y in tensors):
        raise NamelessError("an argument of another type, or one that the function holds itself")
    return [_form(x), x.device, x.requires_grad, [x is y for y in example]]


def _read(path: Path, tensors: list[Tensor]) -> GraphModule | None:
    """The graph in a file; None if there is none, or it is damaged."""
    try:
        seal, text = path.read_text().split("\n", 1)
        return _decoded(json.loads(text), tensors) if seal == _seal(path, text) else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError):
        return None


def _keep(path: Path, graph: GraphModule, tensors: list[Tensor]) -> None:
    """Write the graph to its file, if what would be read from there is the same graph."""
    try:
        text = json.dumps(_encoded(graph, tensors), allow_nan=False)
        if json.dumps(_encoded(_decoded(json.loads(text), tensors), tensors)) != text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
            file.write(f"{_seal(path, text)}\n{text}")
        Path(file.name).replace(path)
    except (NamelessError, OSError):
        return


def _seal(path: Path, text: str) -> str:
    return sha256(f"{path.stem}\n{text}".encode()).hexdigest()


# Graph -> JSON --------------------------------------------------------------------------------------------------------
def _encoded(graph: GraphModule, tensors: list[Tensor]) -> dict[str, Any]:
    """What the graph consists of.

    Raises:
        NamelessError: it has a part for which there is no form.
    """
    place = {_place(x): i for i, x in reversed(list(enumerate(tensors)))}
    constants: list[Tensor] = []
    nodes = []
    for node in graph.graph.nodes:
        target: Any = str(node.target) if node.op in ("placeholder", "output") else None
        if node.op == "get_attr":
            held = constant(graph, node)
            index = place.get(_place(held)) if held.numel() else None
            target = ["constant", len(constants)] if index is None else ["tensor", index]
            constants += [held] if index is None else []
        elif node.op == "call_function":
            target = _target(node.target)
        elif target is None:
            raise NamelessError(f"a node {node.op}")
        arguments, keywords = _argument(tuple(node.args)), {k: _argument(v) for k, v in node.kwargs.items()}
        value = _value(node.meta["val"]) if "val" in node.meta else "none"
        nodes.append([node.name, node.op, target, arguments, keywords, value])
    if sum(x.nbytes for x in constants) > _MOST_BYTES:
        raise NamelessError("constants as large as weights")
    return {"nodes": nodes, "constants": list(map(_contents, constants))}


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _target(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, OpOverload) or target.namespace not in _NAMESPACES:
        raise NamelessError(f"the operation {target}")
    return str(target)


def _argument(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is Node:
        return {"node": value.name}
    if isinstance(value, list | tuple):  # torch.fx has its own immutable lists
        return {"list" if isinstance(value, list) else "tuple": list(map(_argument, value))}
    if kind is torch.device:
        return {"device": str(value)}
    for name, named in _NAMED.items():
        if kind is named:
            return {name: _name(value)}
    raise NamelessError(f"an argument of type {kind.__name__}")


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _value(value: Any) -> Any:
    """The form of a node's result: of a tensor, or of several."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": list(map(_value, value))}
    if not isinstance(value, Tensor):
        raise NamelessError(f"a result of type {type(value).__name__}")
    return _form(value)


def _form(x: Tensor) -> dict[str, Any]:
    shape, stride = list(x.shape), list(x.stride())
    if not all(type(n) is int for n in shape + stride):
        raise NamelessError("sizes that are not numbers")
    return {"shape": shape, "stride": stride, "dtype": _name(x.dtype)}


def _contents(x: Tensor) -> dict[str, Any]:
    data = x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _form(x) | {"device": str(x.device), "data": b64encode(data).decode()}


# JSON -> graph --------------------------------------------------------------------------------------------------------
def _decoded(stored: dict[str, Any], tensors: list[Tensor]) -> GraphModule:
    graph, made = Graph(), dict[str, Node]()
    held = {"tensor": tensors, "constant": list(map(_constant, stored["constants"]))}
    attributes: dict[str, Tensor] = {}
    for name, op, target, arguments, keywords, value in stored["nodes"]:
        if op == "get_attr":
            kind, index = target
            target = f"_{kind}_{index}"
            attributes[target] = held[kind][index]
        elif op == "call_function":
            target = _operation(target)
        args = _plain(arguments, made)
        node = graph.create_node(op, target, args, {k: _plain(v, made) for k, v in keywords.items()}, name)
        made[name] = node
        if value != "none":
            node.meta["val"] = _result(value)
    return GraphModule(attributes, graph)


def _operation(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    if namespace == "dgfast":
        ops.register(packet)
    operation = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if namespace not in _NAMESPACES or not isinstance(operation, OpOverload):
        raise ValueError(name)
    return operation


def _plain(stored: Any, known: dict[str, Node]) -> Any:
    if not isinstance(stored, dict):
        return stored
    ((kind, value),) = stored.items()
    if kind == "node":
        return known[value]
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_plain(v, known) for v in value)
    if kind == "float":
        return float.fromhex(value)
    return torch.device(value) if kind == "device" else _torch(kind, value)


def _torch(kind: str, name: str) -> Any:
    value = getattr(torch, name)
    if type(value) is not _NAMED[kind]:
        raise ValueError(name)
    return value


def _result(stored: Any) -> Any:
    """What a node's result looks like: without values, and so without a device too."""
    if stored is None:
        return None
    if len(stored) == 1:
        ((kind, values),) = stored.items()
        return {"list": list, "tuple": tuple}[kind](map(_result, values))
    return _empty(stored, "meta")


def _empty(form: dict[str, Any], device: str) -> Tensor:
    dtype = _torch("dtype", form["dtype"])
    return torch.empty_strided(form["shape"], form["stride"], dtype=dtype, device=device)


def _constant(stored: dict[str, Any]) -> Tensor:
    x = _empty(stored, stored["device"])
    data = bytearray(b64decode(stored["data"], validate=True))
    values = torch.frombuffer(data, dtype=x.dtype) if data else torch.empty(0, dtype=x.dtype)
    return x.copy_(values.reshape(x.shape))
