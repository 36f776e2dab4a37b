"""Half precision where it pays: the convolutions and matrix products of a float32 ONNX file in float16 or bfloat16.

Everything else (statistics of group normalisation, softmax, preconditioning, guidance, inputs, outputs) stays float32.
So do two kinds of products that cost next to nothing and whose rounding leads a whole run astray: those that the image
has no part in, of noise level and class, and those that take the image in or give the result. The casts around each
product are what a builder fuses into the operations beside it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgfast.runtimes.onnx.values import STATISTIC

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_FLOAT32, _FLOAT64, _BFLOAT16 = 1, 11, 16  # onnx.TensorProto's numbers
TYPES = {"fp16": 10, "bf16": _BFLOAT16}
_WIDE, _SPLIT = "wide", "half_products_split"


def half_products(model: Any, dtype: str, keep_float32: Sequence[str] = ()) -> int:
    """Rewrite `model` in place; the number of nodes that now compute in `dtype` ("fp16" or "bf16").

    Args:
        model: an `onnx.ModelProto` whose first input is the image.
        keep_float32: patterns such as "head*" of the names of nodes to leave alone.
    """
    inner = _inner_products(model.graph)
    chosen = {
        node.output[0] for node in model.graph.node
        if node.output[0] in inner and not any(fnmatchcase(node.name, pattern) for pattern in keep_float32)
    }  # fmt: skip
    _compute_in(model.graph, chosen, TYPES[dtype], dtype)
    _drop_unread(model)
    return len(chosen)


def wide_products(model: Any) -> int:
    """Rewrite `model` in place; the number of products that now compute in double precision.

    They are the matrix products that the image has no part in, one row a sample. For ONNX Runtime, whose CUDA provider
    has tensor cores for half precision only where float32 may round to TensorFloat-32 (`runtimes.onnx.cuda`).
    """
    of_image = _of_image(model.graph)
    chosen = {
        node.output[0] for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.output[0] not in of_image
    }  # fmt: skip
    _compute_in(model.graph, chosen, _FLOAT64, _WIDE)
    return len(chosen)


def _compute_in(graph: Any, products: set[str], to: int, suffix: str) -> None:
    """Cast what the products of these results read to another type, and the results back."""
    from onnx import helper

    weights = {w.name: w for w in graph.initializer if w.data_type == _FLOAT32}
    nodes, cast = [], dict[str, str]()
    for node in graph.node:
        if node.output[0] not in products:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name and name not in cast:
                cast[name] = f"{name}_{suffix}"
                if name in weights and to != _FLOAT64:
                    graph.initializer.append(_rounded(weights[name], cast[name], to))
                else:
                    nodes.append(helper.make_node("Cast", [name], [cast[name]], name=cast[name], to=to))
            if name:
                node.input[i] = cast[name]
        result = node.output[0]
        node.output[0] = f"{result}_in_{suffix}"
        back = helper.make_node("Cast", [node.output[0]], [result], name=f"{result}_back", to=_FLOAT32)
        nodes += [node, back]
    del graph.node[:]
    graph.node.extend(nodes)


def _of_image(graph: Any) -> set[str]:
    """Everything that depends on the first input, the image, and not on its shape alone."""
    of_image = {graph.input[0].name}
    for node in graph.node:
        if node.op_type != "Shape" and of_image.intersection(node.input):
            of_image.update(node.output)
    return of_image


def _inner_products(graph: Any) -> set[str]:
    """Results of the products on the way of the image, but for the first and the last on each way."""
    nodes, of_image = [node for node in graph.node if node.op_type != "Shape"], _of_image(graph)
    products = [
        node for node in nodes
        if node.op_type in PRODUCTS and node.output[0] in of_image and not node.name.startswith(STATISTIC)
    ]  # fmt: skip
    after, before = ({node.output[0] for node in products}, {name for node in products for name in node.input})
    for node in nodes:
        if after.intersection(node.input):
            after.update(node.output)
    for node in reversed(nodes):
        if before.intersection(node.output):
            before.update(node.input)
    return {node.output[0] for node in products if after.intersection(node.input) and node.output[0] in before}


def round_on_a_cpu(model: Any) -> None:
    """Make ONNX Runtime's CPU provider round as its CUDA provider does, to float16 wherever the file says so.

    It computes in float32 there and drops pairs of casts, so that weights alone are rounded; a Max of one argument,
    which it computes in float16, keeps a pair apart. The products left in float32 read TensorFloat-32 on a GPU.
    """
    from onnx import helper

    nodes, to, rounded = [], helper.make_attribute("to", TYPES["fp16"]), set[str]()
    for node in model.graph.node:
        half = node.op_type in PRODUCTS and node.input[0].endswith("_fp16")
        if node.op_type in PRODUCTS and not half and not node.input[0].endswith(_WIDE):
            for i, name in enumerate(node.input[:2]):
                node.input[i] = f"{name}_tf32"
                nodes += _to_tensor_float_32(name) if name not in rounded else []
                rounded.add(name)
        nodes.append(node)
        if to in node.attribute or half:
            name = node.output[0]
            node.output[0] = f"{name}_exact"
            nodes.append(helper.make_node("Max", [node.output[0]], [name], name=f"{name}_rounded"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(helper.make_tensor(_SPLIT, _FLOAT32, [], [2.0**13 + 1]))


def _to_tensor_float_32(name: str) -> list[Any]:
    """Rounded to 11 of 24 bits: p = (2^13 + 1) x, p - (p - x) (Dekker, 1971)."""
    from onnx import helper

    scaled, rest = f"{name}_scaled", f"{name}_rest"
    steps = [("Mul", name, _SPLIT, scaled), ("Sub", scaled, name, rest), ("Sub", scaled, rest, f"{name}_tf32")]
    return [helper.make_node(op, [a, b], [result], name=result) for op, a, b, result in steps]


def _rounded(weight: Any, name: str, to: int) -> Any:
    from onnx import numpy_helper

    array = numpy_helper.to_array(weight)
    if to == _BFLOAT16:
        return _bfloat16(array.astype(np.float32), name)
    return numpy_helper.from_array(array.astype(np.float16), name)


def _bfloat16(array: NDArray[np.float32], name: str) -> Any:
    """Rounded to nearest, ties to even, as PyTorch does."""
    from onnx import TensorProto

    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    tensor = TensorProto(name=name, data_type=_BFLOAT16, dims=array.shape)
    tensor.raw_data = rounded.tobytes()
    return tensor


def _drop_unread(model: Any) -> None:
    """Leave out the float32 weights that only products read."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [w for w in model.graph.initializer if w.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def product_type(model: Any) -> str:
    """Of which type its products are: float32, fp16 or bf16, by the types of the weights."""
    types = {w.data_type for w in model.graph.initializer}
    return next((name for name, code in TYPES.items() if code in types), "float32")
