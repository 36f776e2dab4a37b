"""TensorRT for RTX, a small ONNX file for it, and `export/to_trt.py` to call."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from dgfast.errors import UserError
from dgfast.export import to_trt
from dgfast.runtimes.tensorrt.builder import Options
from dgfast.runtimes.tensorrt.library import find

BATCH = Options((1, 4, 8))
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")

try:
    FLAVOR, TRT = find("tensorrt-rtx")
except UserError:  # it has wheels for Linux on x86-64 only
    pytest.skip("TensorRT for RTX is not installed", allow_module_level=True)


def graph(sizes: tuple[Any, ...] = ("batch", 1, 16, 16), channels: int = 8, groups: int = 4) -> onnx.ModelProto:
    """Two convolutions, a group normalisation in single operations on four dimensions, and two matrix products.

    The first convolution and the last product are those that half precision leaves alone.
    """
    rng, c, g = np.random.default_rng(0), channels, groups
    constants = {
        "stem": rng.normal(size=(c, 1, 3, 3)).astype(np.float32),
        "w": rng.normal(size=(c, c, 3, 3)).astype(np.float32), "m": rng.normal(size=(c, 10)).astype(np.float32),
        "n": rng.normal(size=(10, 10)).astype(np.float32),
        "hw": np.array([2, 3]), "two": np.array([2]), "grouped": np.array([0, g, c // g, 1]),
        "repeat": np.array([1, 1, c // g, 1]), "flat": np.array([0, c, 1, 1]), "eps": np.array(1e-5, np.float32),
    }  # fmt: skip

    def mean(x: str) -> list[onnx.NodeProto]:
        """Of each group, for each of its channels: {x}_mean."""
        steps = [("ReduceMean", "hw"), ("Reshape", "grouped"), ("ReduceMean", "two"), ("Expand", "repeat")]
        steps += [("Reshape", "flat")]
        names = [x, *(f"{x}_{i}" for i in range(4)), f"{x}_mean"]
        return [
            helper.make_node(op, [names[i], constant], [names[i + 1]], f"{x}/{op}_{i}")
            for i, (op, constant) in enumerate(steps)
        ]

    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["z"], "body/stem", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["z", "w"], ["y"], "body/conv", pads=[1, 1, 1, 1]), *mean("y"),
        helper.make_node("Sub", ["y", "y_mean"], ["d"]), helper.make_node("Mul", ["d", "d"], ["s"]), *mean("s"),
        helper.make_node("Add", ["s_mean", "eps"], ["v"]), helper.make_node("Sqrt", ["v"], ["deviation"]),
        helper.make_node("Div", ["d", "deviation"], ["normal"]),
        helper.make_node("ReduceMean", ["normal", "hw"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "m"], ["features"], "head/product"),
        helper.make_node("MatMul", ["features", "n"], ["logits"], "head/last"),
    ]  # fmt: skip
    declared = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [sizes[0], *rest])
        for name, rest in {"x": sizes[1:], "normal": (c, *sizes[2:]), "logits": (10,)}.items()
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_graph(nodes, "test", declared[:1], declared[1:], weights)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(to_trt.main, ["--flavor", "tensorrt-rtx", *arguments])


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value.message)
