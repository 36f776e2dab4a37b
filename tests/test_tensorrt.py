"""TensorRT engines without a GPU: the real TensorRT for RTX builds them here, and refuses here what it can't load."""

import ast
import ctypes
import dataclasses
import hashlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import dgfast
from dgfast import bundle, sample
from dgfast.errors import UserError
from dgfast.export import engine_builder, self_test, to_trt
from dgfast.export.engine_builder import Options, build, parse
from dgfast.export.half_products import PRODUCTS, half_products, product_type, round_on_a_cpu
from dgfast.export.joint_graph import joint
from dgfast.runtimes import engine_file, tensorrt, tensorrt_library
from dgfast.runtimes.agreement import relative_error
from dgfast.runtimes.engine_file import NEVER_EXECUTED, EngineFile
from dgfast.runtimes.onnx import OnnxEngine
from dgfast.runtimes.onnx_writer import convert
from dgfast.runtimes.tensorrt_library import deserialize, find, layers, listener, obstacles

REPOSITORY = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "test.onnx"
    onnx.save(graph(), path)
    return path


@pytest.fixture(scope="module")
def engine(file: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineFile:
    """An engine folder as `export/to_trt.py` leaves it."""
    out = tmp_path_factory.mktemp("engine") / "out"
    done = run("--onnx", str(file), "--batch", "1,4,8", "--out", str(out))
    assert done.exit_code == 0, done.output
    return engine_file.read(out)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(to_trt.main, ["--flavor", "tensorrt-rtx", *arguments])


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value.message)


# Building -------------------------------------------------------------------------------------------------------------
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
    shapes = {"x": ["b", 3, 3], "y": ["b"]}
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
    found = bundle.read("mnist32")
    subject = joint(dgfast.load(found, guidance=found.guidance), found.sampling, found.guidance, "denoiser")
    example = dict(subject.case("example", [1.0, 2.0], seed=1).inputs)
    path = tmp_path / "mnist32.onnx"
    onnx.save(
        convert(subject.function, example, subject.outputs, rank_4=True), path
    )  # an open batch takes twice as long
    built = build(TRT, FLAVOR, path, BATCH)
    kinds = [layer.kind for layer in built.layers]
    convolutions = sum(node.op_type in ("Conv", "ConvTranspose") for node in onnx.load(path).graph.node)
    assert kinds.count("correlation") > 0.9 * convolutions > 80, "of the networks and of their gradient"
    assert {t for layer in built.layers for t in layer.types} <= {"Float", "Int32", "Int64", "Bool"}
    assert built.batch == (2, 2, 2) and len(built.plan) > path.stat().st_size / 2


# The script -----------------------------------------------------------------------------------------------------------
@CPU_ONLY
def test_trt_script_says_what_was_never_executed(engine: EngineFile, file: Path) -> None:
    report = (engine.folder / "report.md").read_text()
    assert f"{NEVER_EXECUTED} (no CUDA GPU on this machine)" in report.splitlines()[0]
    assert "Nothing is known of its values or its speed" in report
    assert engine.parity == NEVER_EXECUTED and engine.gpu is None and not engine.errors
    assert engine.batch == (1, 4, 8) and engine.version == TRT.__version__
    assert engine.source["onnx_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hashlib.sha256(engine.plan()).hexdigest() == engine.sha256
    assert "| correlation | 2 |" in (engine.folder / "layers.md").read_text()
    inputs, outputs = tensorrt.read_self_test(engine.self_test)
    made = OnnxEngine(file)({name: torch.from_numpy(a) for name, a in inputs.items()})
    assert set(outputs) == set(made) and all(np.allclose(outputs[name], made[name]) for name in made)


def test_trt_script_only_parses_if_asked(file: Path, tmp_path: Path) -> None:
    done = run("--onnx", str(file), "--parse-only", "--out", str(tmp_path))
    assert done.exit_code == 0 and "no error; nothing was built" in done.output
    assert not list(tmp_path.glob("*.engine"))


def test_trt_script_rounds_a_float32_file_but_no_other(file: Path, tmp_path: Path) -> None:
    done = run("--onnx", str(file), "--dtype", "fp16", "--batch", "2", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = engine_file.read(tmp_path)
    assert (found.dtype, found.batch, found.tolerance) == ("fp16", (2, 2, 2), 2e-2)
    assert "Half" in (tmp_path / "layers.md").read_text()
    again = run("--onnx", str(tmp_path / "model-fp16.onnx"), "--dtype", "bf16", "--out", str(tmp_path / "again"))
    assert again.exit_code == 2 and "is in fp16; give the float32 file" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "{tmp}/none.onnx"], "none.onnx: not a readable ONNX file"),
        (["--onnx", "{tmp}/text.onnx"], "text.onnx: not a readable ONNX file"),
        ([], "give either --bundle or --onnx"),
        (["--bundle", "mnist32", "--onnx", "x"], "give either --bundle or --onnx"),
        (["--onnx", "x", "--batch", "1,2"], "expected one batch size or three"),
        (
            ["--onnx", "x", "--cfg-scale", "2", "--what", "step"],
            "x has its function inside: leave out --what, --cfg-scale",
        ),
        (
            ["--bundle", "mnist32", "--what", "generator", "--dg-weight", "1"],
            "a generator has no guidance: leave out --dg",
        ),
        (["--bundle", "nowhere"], "unknown bundle 'nowhere'"),
    ],
)
def test_trt_script_refuses_in_a_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    done = run(*given, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and message in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("Error")]) == 1


@CPU_ONLY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--runtime tensorrt needs --engine FILE"),
        (("--engine", "{folder}/model.engine"), "engines run on NVIDIA GPUs only"),
        (("--engine", "nowhere/model.engine"), "cannot read"),
    ],
)
def test_trt_sampling_without_what_it_needs_ends_in_a_line(
    options: tuple[str, ...], message: str, engine: EngineFile, tmp_path: Path
) -> None:
    given = [option.format(folder=engine.folder) for option in options]
    arguments = ["--runtime", "tensorrt", *given, "--seeds", "0", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(sample.main, arguments)
    assert done.exit_code == 2 and message in done.output and not (tmp_path / "out").exists()


# Loading --------------------------------------------------------------------------------------------------------------
@CPU_ONLY
def test_trt_engine_without_a_gpu_says_so(engine: EngineFile) -> None:
    assert "engines run on NVIDIA GPUs only, and there is none here" in refused(lambda: tensorrt.load(engine.path))


def damaged(plan: bytes) -> dict[str, bytes]:
    return {"empty": b"", "zeros": bytes(4096), "truncated": plan[:-7], "short": plan[:100], "text": b"engine " * 99}


@pytest.mark.parametrize("kind", damaged(b""))
def test_trt_library_refuses_a_damaged_engine_in_a_line(kind: str, engine: EngineFile) -> None:
    broken = damaged(engine.plan())[kind]
    message = refused(lambda: deserialize(TRT, broken, listener(TRT), "model.engine"))
    assert message.startswith(f"model.engine: {TRT.__name__} {TRT.__version__} can't load this engine: ")
    assert len(message.splitlines()) == 1 and "/_src/" not in message and "no reason given" not in message
    assert obstacles(TRT, broken, listener(TRT))


def test_trt_engine_that_was_changed_is_not_given_to_the_library(engine: EngineFile, tmp_path: Path) -> None:
    copy = dataclasses.replace(engine, folder=tmp_path)
    copy.path.write_bytes(engine.plan()[:-1] + b"!")
    copy.write()
    assert "corrupt, or not the engine that engine.json describes" in refused(lambda: tensorrt.load(tmp_path))
    copy.path.unlink()
    assert "model.engine: No such file" in refused(lambda: tensorrt.load(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"format": 9}, {"batch": [1, 2]}, {"batch": "all"}, {"sha256": 3}, {"flavor": "other"}, {"more": 1}, None],
)
def test_trt_engine_with_a_broken_description_is_refused(
    change: dict[str, Any] | None, engine: EngineFile, tmp_path: Path
) -> None:
    raw = json.loads((engine.folder / "engine.json").read_text())
    (tmp_path / "engine.json").write_text("{" if change is None else json.dumps(raw | change))
    assert str(tmp_path / "engine.json") in refused(lambda: tensorrt.load(tmp_path))
    assert "cannot read" in refused(lambda: tensorrt.load(tmp_path / "missing" / "model.engine"))


def test_trt_engine_is_for_one_library_version_gpu_and_profile(engine: EngineFile) -> None:
    other = dataclasses.replace(engine, flavor="tensorrt", version="10.1", gpu="A100", capability="8.0")
    assert "built by tensorrt, which tensorrt-rtx can't load" in refused(lambda: other.check_library(FLAVOR, "10.1"))
    assert "built by tensorrt 10.1, here is 10.2" in refused(lambda: other.check_library("tensorrt", "10.2"))
    dataclasses.replace(other, version_compatible=True).check_library("tensorrt", "10.2")
    wrong = refused(lambda: other.check_gpu("H100", "9.0"))
    assert "built for compute capability 8.0 (A100), this GPU is a H100 with 9.0" in wrong
    other.check_gpu("A30", "8.0")
    dataclasses.replace(other, hardware_compatible="ampere+").check_gpu("H100", "9.0")
    engine.check_gpu("any", "8.9")  # TensorRT for RTX itself says which it supports
    assert "8.9" in refused(lambda: dataclasses.replace(engine, capabilities=("8.9",)).check_gpu("RTX 5090", "12.0"))
    for batch in (1, 8):
        engine.check_batch(batch)
    for batch in (0, 9):
        assert f"takes batches of 1 to 8 images, not {batch}" in refused(lambda: engine.check_batch(batch))  # noqa: B023


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx", None])
def test_trt_library_that_is_missing_is_named_with_its_extra(
    flavor: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (m for f in tensorrt_library.FLAVORS.values() for m in f.modules):
        monkeypatch.setitem(sys.modules, module, None)
    message = refused(lambda: find(flavor))
    assert ("dgfast[trt]" in message) == (flavor != "tensorrt-rtx")
    assert ("dgfast[trt-rtx]" in message) == (flavor != "tensorrt")
    assert "not installed here" in message and len(message.splitlines()) == 1


def test_trt_type_stubs_are_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, its stubs leave a folder that Python imports as an empty package."""
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    assert "TensorRT not installed here" in refused(lambda: find("tensorrt"))
    assert find() == (FLAVOR, TRT)


def test_trt_self_test_names_the_first_output_that_differs(engine: EngineFile, tmp_path: Path) -> None:
    expected = {"denoised": torch.ones(2, 1, 4, 4), "log_ratio": torch.tensor([0.5, -3.0])}
    tensorrt.check_values(engine, {}, expected, expected)
    off = expected | {"log_ratio": torch.tensor([0.5, -3.01])}
    assert "output log_ratio is off by 3.3e-03" in refused(lambda: tensorrt.check_values(engine, {}, off, expected))
    not_a_number = expected | {"denoised": torch.full((2, 1, 4, 4), torch.nan)}
    assert "output denoised is off by inf" in refused(lambda: tensorrt.check_values(engine, {}, not_a_number, expected))
    assert "output denoised" in refused(lambda: tensorrt.check_values(engine, {}, {}, expected))
    (tmp_path / "self_test.npz").write_bytes(b"PK no archive")
    assert "not a self-test" in refused(lambda: tensorrt.read_self_test(tmp_path / "self_test.npz"))


def test_trt_self_test_allows_what_float32_leaves_open_of_a_predicted_noise(engine: EngineFile) -> None:
    """1e-6 of a noisy image of size 80 is 8e-5: more than 1e-4 of the denoised image of size 0.5 behind it."""
    inputs, expected = {"x": torch.full((1, 1, 2, 2), 80.0)}, {"denoised": torch.full((1, 1, 2, 2), 0.5)}
    predicts = dataclasses.replace(engine, source=engine.source | {"predicts_noise": "true"})
    for off, passes in ((7e-5, True), (9e-5, False)):
        made = {"denoised": expected["denoised"] + off}
        if passes:
            tensorrt.check_values(predicts, inputs, made, expected)
        else:
            assert "output denoised is off" in refused(lambda: tensorrt.check_values(predicts, inputs, made, expected))  # noqa: B023
        assert "output denoised is off" in refused(lambda: tensorrt.check_values(engine, inputs, made, expected))  # noqa: B023


class MemoryContext:
    """An execution context that computes twice the float32 input x from nothing but addresses and shapes."""

    def __init__(self, most: int) -> None:
        self.most, self.shape, self.addresses = most, (0,), dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return len(shape) == 2 and shape[1] == 3

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        x, y = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in ("x", "y"))
        y[:] = [2 * value for value in x]
        return stream == 7


class MemoryEngine:
    num_io_tensors = 2

    def create_execution_context(self) -> MemoryContext:
        return MemoryContext(8)

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_dtype(self, name: str) -> Any:
        return TRT.DataType.FLOAT

    def get_tensor_mode(self, name: str) -> Any:
        return TRT.TensorIOMode.INPUT if name == "x" else TRT.TensorIOMode.OUTPUT


def test_trt_engine_binds_tensors_by_address(engine: EngineFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    loaded = tensorrt.TensorRTEngine(TRT, MemoryEngine(), engine, torch.device("cpu"))
    assert loaded.inputs == {"x": (("batch", 3), torch.float32)} and loaded.batch is None
    x = torch.arange(6, dtype=torch.float64).view(3, 2).T  # neither float32 nor contiguous
    made = loaded({"x": x})
    assert list(made) == ["y"] and made["y"].dtype == torch.float32 and torch.equal(made["y"], 2 * x.float())
    assert "its inputs are x, not z" in refused(lambda: loaded({"z": x}))
    assert "takes batches of 1 to 8 images, not 9" in refused(lambda: loaded({"x": torch.ones(9, 3)}))
    assert "x has shape [2, 4], not ['batch', 3]" in refused(lambda: loaded({"x": torch.ones(2, 4)}))


# The interface --------------------------------------------------------------------------------------------------------
# Variables in the code that hold objects of the library, and their classes there.
OBJECTS = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "inspector": "EngineInspector",
}  # fmt: skip


def test_trt_code_uses_what_the_library_has() -> None:
    """Also what runs on a GPU alone: every attribute of the module and of the objects above."""
    used = set()
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
    for names in used - {("__name__",), ("__version__",)}:
        value = TRT
        for name in names:
            assert hasattr(value, name), f"{TRT.__name__} {TRT.__version__} has no {'.'.join(names)}"
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
