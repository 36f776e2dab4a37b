"""TensorRT engines without a GPU: the real TensorRT for RTX builds them here."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

import dgfast
from dgfast import bundle
from dgfast.export import self_test
from dgfast.export.half_products import PRODUCTS, half_products, product_type, round_on_a_cpu, wide_products
from dgfast.export.joint_graph import joint
from dgfast.graph.agreement import relative_error
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.values import STATISTIC
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt import builder as engine_builder
from dgfast.runtimes.tensorrt import engine as tensorrt
from dgfast.runtimes.tensorrt import library as tensorrt_library
from dgfast.runtimes.tensorrt.builder import Options, build, parse
from dgfast.runtimes.tensorrt.library import layers
from tests.support.tensorrt import BATCH, FLAVOR, TRT, graph, refused


@pytest.mark.parametrize(("dtype", "half"), [("float32", set()), ("fp16", {"Half"}), ("bf16", {"BFloat16"})])
def test_trt_builds_products_in_the_type_that_was_asked_for(dtype: str, half: set[str], tmp_path: Path) -> None:
    model, path = graph(), tmp_path / "test.onnx"
    if half:
        assert half_products(model, dtype) == 2
    assert product_type(model) == dtype
    onnx.save(model, path)
    built = build(TRT, FLAVOR, path, BATCH)
    types = {layer.name.partition("_")[0]: set(layer.types) for layer in built.layers}
    assert types["body/conv"] == (half or {"Float"}) and types["head/last"] == {"Float"}
    assert {t for layer in built.layers for t in layer.types} == half | {"Float"}, "statistics stay float32"
    assert built.batch == (1, 4, 8) and built.parsed_layers > len(built.layers) > 3


def test_trt_keeps_what_is_named_in_float32(file: Path) -> None:
    model = onnx.load(file)
    assert half_products(model, "fp16", ["head/*"]) == 1
    by_name = {node.name: node for node in model.graph.node}
    assert list(by_name["head/product"].input) == ["pooled", "m"]
    assert list(by_name["body/conv"].input) == ["z_fp16", "w_fp16"]
    assert {w.name for w in model.graph.initializer} >= {"m", "w_fp16"} and "w" not in {
        w.name for w in model.graph.initializer
    }


def test_trt_products_without_the_image_stay_float32() -> None:
    """Those of the noise level alone, also where a batch size taken from the image is in them."""

    def function(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor]:
        shift = torch.stack([sigma, sigma], 1) @ torch.ones(2, 3) + torch.zeros(len(x), 3)
        return (((x @ torch.ones(3, 3)).exp() @ torch.ones(3, 3) + shift) @ torch.ones(3, 3),)

    model = convert(function, {"x": torch.ones(2, 3), "sigma": torch.ones(2)}, ["y"], dynamic=True)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    assert len(products) == 4 and half_products(model, "fp16") == 1
    (rounded,) = (node for node in products if node.input[0].endswith("_fp16"))
    assert rounded.input[0].startswith("Exp")


def test_trt_half_products_round_on_a_cpu_as_on_a_gpu(tmp_path: Path) -> None:
    """ONNX Runtime drops pairs of casts there: what overflows float16 must not pass unseen."""
    eye, scale = torch.eye(3), torch.tensor([1e-9, 1 / 3, 1e4])
    model = convert(lambda x: (((x @ eye) * scale) @ eye @ eye,), {"x": torch.ones(1, 3)}, ["y"])
    assert half_products(model, "fp16") == 1
    path = tmp_path / "rounded.onnx"
    onnx.save(model, path)
    assert OnnxEngine(path)({"x": torch.ones(1, 3)})["y"].equal(scale[None]), "if not, `round_on_a_cpu` can go"
    round_on_a_cpu(model)
    onnx.save(model, path)
    engine = OnnxEngine(path)
    assert engine({"x": torch.ones(1, 3)})["y"].equal(scale.half().float()[None])
    assert not engine({"x": torch.full((1, 3), 10.0)})["y"].isfinite().any()


def test_trt_products_left_in_float32_read_tensor_float_32(tmp_path: Path) -> None:
    """Eleven bits of every factor, ties to even, in every range of float32."""
    eye, path = torch.eye(4), tmp_path / "rounded.onnx"
    model = convert(lambda x: (x @ eye,), {"x": torch.ones(1, 4)}, ["y"])
    round_on_a_cpu(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    x = torch.tensor([[1 + 2**-11, 1 + 3 * 2**-11, 1e-30, -(2.0**100) * (1 + 2**-10 + 2**-20)]])
    expected = torch.tensor([[1.0, 1 + 2**-9, 1e-30, -(2.0**100) * (1 + 2**-10)]])
    found = OnnxEngine(path)({"x": x})["y"]
    assert found[0, [0, 1, 3]].equal(expected[0, [0, 1, 3]])
    assert abs(float(found[0, 2]) / 1e-30 - 1) <= 2**-11 and float(found[0, 2]) != float(x[0, 2])


def test_half_precision_leaves_the_sums_of_a_normalisation_exact(tmp_path: Path) -> None:
    """The squares of a group, 4,096 numbers of deviation 10, add up to more than float16 holds."""
    generator, path = torch.Generator().manual_seed(0), tmp_path / "statistics.onnx"
    eye = torch.eye(8).view(8, 8, 1, 1)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = F.conv2d(F.group_norm(F.conv2d(F.conv2d(x, eye), eye), 2), eye)
            (slope,) = torch.autograd.grad(F.conv2d(y, eye).pow(3).sum(), x)
        return y.detach(), slope

    x = 10 * torch.randn(2, 8, 32, 32, generator=generator)
    model = convert(function, {"x": x}, ["y", "slope"])
    sums = [node.name for node in model.graph.node if node.name.startswith(STATISTIC)]
    half_products(model, "fp16")
    halved = [node.name for node in model.graph.node if node.op_type in PRODUCTS and node.input[0].endswith("_fp16")]
    assert len(sums) == 2 and halved and not {*sums} & {*halved}
    round_on_a_cpu(model)
    onnx.save(model, path)
    results = OnnxEngine(path)({"x": x})
    for name, expected in zip(("y", "slope"), function(x), strict=True):
        assert relative_error(results[name], expected) < 5e-3, name


def test_half_precision_leaves_what_the_image_has_no_part_in_exact(tmp_path: Path) -> None:
    """Not for TensorRT: in double precision, because a GPU rounds float32 there as soon as it has tensor cores."""
    eye, path = torch.eye(3) / 3, tmp_path / "wide.onnx"

    def function(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor]:
        return (x @ eye + (sigma[:, None].expand(-1, 3) @ eye) @ eye,)

    model = convert(function, {"x": torch.zeros(2, 3), "sigma": torch.ones(2)}, ["y"], dynamic=True)
    assert wide_products(model) == 2
    round_on_a_cpu(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    sigma = torch.tensor([1 + 2**-12, 3.0])
    y = OnnxEngine(path)({"x": torch.zeros(2, 3), "sigma": sigma})["y"]
    torch.testing.assert_close(y, (sigma / 9)[:, None].expand(2, 3), rtol=1e-7, atol=0)


def test_trt_half_products_are_off_by_rounding_alone(file: Path, tmp_path: Path) -> None:
    model, path = onnx.load(file), tmp_path / "half.onnx"
    half_products(model, "fp16")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    exact, rounded = OnnxEngine(file), OnnxEngine(path)
    inputs = self_test.case(exact, 3).inputs
    for name, value in exact(inputs).items():
        assert 0 < relative_error(rounded(inputs)[name], value) < 2e-3


def test_trt_bfloat16_weights_are_rounded_as_pytorch_rounds(file: Path) -> None:
    model = onnx.load(file)
    exact = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    half_products(model, "bf16")
    stored = next(w for w in model.graph.initializer if w.name == "w_bf16")
    expected = torch.from_numpy(exact["w"].copy()).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(np.frombuffer(stored.raw_data, np.int16).reshape(expected.shape), expected)


def test_trt_takes_the_batch_that_a_file_fixes(tmp_path: Path) -> None:
    onnx.save(graph((2, 1, 16, 16)), tmp_path / "fixed.onnx")
    assert build(TRT, FLAVOR, tmp_path / "fixed.onnx", Options((1, 4, 8))).batch == (2, 2, 2)


def test_trt_refuses_an_open_size_that_is_no_batch(tmp_path: Path) -> None:
    onnx.save(graph(("batch", 1, "height", 16)), tmp_path / "open.onnx")
    assert "only its first axis, the batch, may be open" in refused(
        lambda: build(TRT, FLAVOR, tmp_path / "open.onnx", BATCH)
    )


def test_trt_reports_what_the_parser_refuses_a_line_each(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="head/determinant")
    shapes: dict[str, list[str | int | None]] = {"x": ["b", 3, 3], "y": ["b"]}
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    onnx.save(helper.make_model(helper.make_graph([node], "g", sides[:1], sides[1:])), tmp_path / "det.onnx")
    first, *reasons = refused(lambda: parse(TRT, tmp_path / "det.onnx")).splitlines()
    assert "det.onnx" in first and reasons == ["  Det node head/determinant: UNSUPPORTED_NODE: false"]
    (tmp_path / "no.onnx").write_bytes(b"no protobuf" * 100)
    assert "MODEL_DESERIALIZE_FAILED" in refused(lambda: parse(TRT, tmp_path / "no.onnx"))
    assert "no such file" in refused(lambda: parse(TRT, tmp_path / "missing.onnx"))


@pytest.mark.parametrize(
    ("options", "flavor", "message"),
    [
        (Options((4, 1, 8)), "tensorrt-rtx", "expected 1 <= least <= best <= most"),
        (Options((0, 1, 8)), "tensorrt", "expected 1 <= least <= best <= most"),
        (Options((1, 1, 8), version_compatible=True), "tensorrt-rtx", "--version-compatible: TensorRT for RTX has no"),
        (Options((1, 1, 8), hardware_compatible="ampere+"), "tensorrt-rtx", "--capability narrows that"),
        (Options((1, 1, 8), timing_cache=Path("cache")), "tensorrt-rtx", "--timing-cache: TensorRT for RTX has no"),
        (Options((1, 1, 8), capabilities=("8.9",)), "tensorrt", "--capability: TensorRT has no"),
    ],
)
def test_trt_refuses_options_that_a_flavor_does_not_know(options: Options, flavor: str, message: str) -> None:
    assert message in refused(lambda: options.check(flavor))


def test_trt_builds_for_listed_capabilities(file: Path) -> None:
    assert build(TRT, FLAVOR, file, dataclasses.replace(BATCH, capabilities=("8.9", "12.0"))).plan
    unknown = refused(lambda: build(TRT, FLAVOR, file, dataclasses.replace(BATCH, capabilities=("9.0",))))
    assert unknown.startswith("--capability 9.0: ") and "8.9, 12.0" in unknown


def test_trt_builds_the_guided_step_of_mnist32(tmp_path: Path) -> None:
    shipped = bundle.read("mnist32")
    subject = joint(dgfast.load(shipped, guidance=shipped.guidance), shipped.sampling, shipped.guidance, "denoiser")
    example = dict(subject.case("example", [1.0, 2.0], seed=1).inputs)
    path = tmp_path / "mnist32.onnx"
    onnx.save(
        convert(subject.function, example, subject.outputs, rank_4=True), path
    )  # an open batch takes twice as long
    built = build(TRT, FLAVOR, path, BATCH)
    kinds = [layer.kind for layer in built.layers]
    convolutions = sum(node.op_type in ("Conv", "ConvTranspose") for node in onnx.load(path).graph.node)
    assert kinds.count("correlation") > 0.9 * convolutions > 70, "of the networks and of their gradient"
    assert {t for layer in built.layers for t in layer.types} <= {"Float", "Int32", "Int64", "Bool"}
    assert built.batch == (2, 2, 2) and len(built.plan) > path.stat().st_size / 2


# The interface --------------------------------------------------------------------------------------------------------
# Variables in the code that hold objects of the library, and their classes there.
OBJECTS = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "inspector": "EngineInspector",
}  # fmt: skip


def test_trt_code_uses_what_the_library_has() -> None:
    """Also what runs on a GPU alone: every attribute of the module and of the objects above."""
    used: set[tuple[str, ...]] = set()
    for path in (engine_builder.__file__, tensorrt.__file__, tensorrt_library.__file__):
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node).removeprefix("self._").removeprefix("self.")
                owner, *names = dotted.partition("(")[0].split(".")
                if owner == "trt" and all(name.isidentifier() for name in names):
                    used.add(tuple(names[:2]))
                elif owner in OBJECTS and names and path != tensorrt_library.__file__:
                    used.add((OBJECTS[owner], names[0]))
    assert {owner for owner, *_ in used} >= set(OBJECTS.values()) - {"Runtime", "EngineInspector"}
    for path_to in used - {("__name__",), ("__version__",)}:
        value = TRT
        for name in path_to:
            assert hasattr(value, name), f"{TRT.__name__} {TRT.__version__} has no {'.'.join(path_to)}"
            value = getattr(value, name)


def test_trt_layers_are_read_from_the_inspectors_text() -> None:
    text = (
        "Layers:\nName: a, LayerType: gemm, Inputs: [ { Name: p, Datatype: Half, Format: x }], Constants: "
        "[ { Name: q, Datatype: Float }], Outputs: [ { Name: r, Datatype: Half }], TacticName: t\n"
        "Name: b, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: \n\nI/O Tensors:\n Name: x"
    )
    assert [(layer.name, layer.kind, layer.types) for layer in layers(text)] == [
        ("a", "gemm", ("Half",)), ("b", "kgen", ()),
    ]  # fmt: skip
    assert tensorrt_library.layer_table(layers(text)).splitlines()[-1] == "| all | 2 | 1 | 1 |"
