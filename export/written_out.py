"""ONNX Runtime's own operators in ONNX's, as its documentation defines them: for its CPU provider, which lacks them.

    GroupNorm       y = a(gamma (x - m) / sqrt(v + eps) + beta),  m and v of the group, a the silu or nothing
    SkipGroupNorm   the same of s = x + skip, and s;  skip [B, H, W, C], [B, 1, 1, C] or [B, C]

Written apart from `dgfast.runtimes.onnx.normalisation`, of whose errors it must know nothing.
"""

from typing import Any

import numpy as np


def written_out(model: Any) -> int:
    """Rewrite `model` in place; the number of nodes that were replaced."""
    nodes, replaced = [], 0
    for node in model.graph.node:
        if node.domain:
            nodes += _group_norm(model.graph, node)
            replaced += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return replaced


def _group_norm(graph: Any, node: Any) -> list[Any]:
    from onnx import helper, numpy_helper

    x, gamma, beta, *skip = node.input
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    nodes: list[Any] = []

    def constant(values: Any, dtype: Any) -> str:
        name = f"{node.name}_constant_{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def add(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{node.output[0]}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], f"{name}_{op}", **attributes))
        return name

    if skip:
        channels = next(weight.dims[0] for weight in graph.initializer if weight.name == gamma)
        pixels = constant([0, -1, channels], np.int64)
        total = add("Add", *(add("Reshape", term, pixels) for term in (x, skip[0])))
        x = add("Reshape", total, add("Shape", x), output=node.output[1] if len(node.output) > 1 else "")
    first = add("Transpose", x, perm=[0, 3, 1, 2])
    ones, zeros = (constant([value] * options["groups"], np.float32) for value in (1, 0))
    rows = add("Reshape", first, constant([0, options["groups"], -1], np.int64))
    normal = add("InstanceNormalization", rows, ones, zeros, epsilon=options["epsilon"])
    last = add("Transpose", add("Reshape", normal, add("Shape", first)), perm=[0, 2, 3, 1])
    y = add("Add", add("Mul", last, gamma), beta)
    last_step = ("Mul", y, add("Sigmoid", y)) if options["activation"] else ("Identity", y)
    add(*last_step, output=node.output[0])
    return nodes
