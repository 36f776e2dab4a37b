"""Changes to honest ONNX files, as `mutations` has them for other formats."""

import json
import random
from collections.abc import Callable
from typing import Any

from tests.support.mutations import NUMBERS, flipped, json_text


def model(rng: random.Random, content: bytes) -> bytes:
    """Another model: a field of a node, a weight, an input or of what it says of itself is another."""
    from onnx import ModelProto

    if rng.random() < 0.2:
        return flipped(rng, content)
    changed = ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_ONNX_CHANGES)(rng, changed)
    return changed.SerializeToString()


def _change_node(rng: random.Random, model: Any) -> None:
    node = rng.choice(model.graph.node)
    match rng.randrange(5):
        case 0:
            node.op_type = rng.choice(("Identity", "Tile", "Expand", "Loop", "If", "Gather", "Reshape", "a\x1b[2J", ""))
        case 1 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(("", "nowhere", node.output[0]))
        case 2:
            node.output[0] = rng.choice(("", "x", model.graph.output[0].name))
        case 3:
            model.graph.node.remove(node) if len(model.graph.node) > 1 else None
        case _:
            node.domain = rng.choice(("", "com.microsoft", "\x1b"))


def _change_weight(rng: random.Random, model: Any) -> None:
    weight = rng.choice(model.graph.initializer)
    match rng.randrange(5):
        case 0:
            del weight.dims[:]
            weight.dims.extend(_int64(rng) for _ in range(rng.randrange(5)))
        case 1:
            weight.raw_data = flipped(rng, weight.raw_data)
        case 2:
            weight.data_type = rng.randrange(25)
        case 3:
            weight.data_location = 1
            for key, value in (("location", rng.choice(("/etc/passwd", "../x", "x.onnx.data"))), ("length", "9" * 12)):
                weight.external_data.add(key=key, value=value)
        case _:
            weight.raw_data = weight.raw_data * 3


def _change_ends(rng: random.Random, model: Any) -> None:
    end = rng.choice([*model.graph.input, *model.graph.output])
    kind = end.type.tensor_type
    match rng.randrange(4):
        case 0:
            kind.elem_type = rng.randrange(25)
        case 1 if kind.shape.dim:
            rng.choice(kind.shape.dim).dim_value = _int64(rng)
        case 2:
            end.name = rng.choice(("", "\x1b[2J", "x", "nowhere"))
        case _:
            kind.shape.dim.add(dim_value=rng.choice((0, 1, 2**31)))


def _change_words(rng: random.Random, model: Any) -> None:
    if rng.random() < 0.2:
        model.opset_import[0].version = rng.choice((0, 1, 13, 999))
    elif rng.random() < 0.2:
        model.ir_version = rng.choice((0, 3, 999))
    else:
        said = rng.choice(model.metadata_props)
        said.value = json_text(rng, json.loads(said.value)).decode("utf-8", "replace")


_ONNX_CHANGES: tuple[Callable[[random.Random, Any], None], ...] = (
    _change_node, _change_weight, _change_ends, _change_words,
)  # fmt: skip


def _int64(rng: random.Random) -> int:
    return max(-(2**63), min(2**63 - 1, rng.choice(NUMBERS)))
