"""What TensorRT does on a GPU, on a pretended one: engines are built, loaded, bound, judged and timed."""

import dataclasses
import hashlib
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import ops
from dgfast.bundle import Bundle
from dgfast.export import self_test, to_trt
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.cuda import build as cuda_build
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.writer import convert
from dgfast.runtimes.tensorrt import build as trt_build
from dgfast.runtimes.tensorrt import builder as trt_builder
from dgfast.runtimes.tensorrt import engine as tensorrt
from dgfast.runtimes.tensorrt import file as engine_file
from dgfast.runtimes.tensorrt import library
from dgfast.runtimes.tensorrt.builder import Options
from dgfast.runtimes.tensorrt.file import EXECUTED, EngineFile
from tests.support import tensorrt_on_gpu as pretended
from tests.support.pretended_cuda import CUDA, NAME, compiled, pretended_cuda
from tests.support.tensorrt import FLAVOR, TRT, refused, run


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # one of its own: what a test changes of it must be undone before
        patch.setattr(TRT, "Runtime", pretended.Runtime)
        for module, name in ((trt_build, "build_engine"), (to_trt, "build")):
            patch.setattr(module, name, pretended.build)
        with pretended_cuda():
            yield


def doubling(folder: Path, **described: Any) -> EngineFile:
    """The engine of y = 2 x for batches of 1 to 8 rows of three numbers."""
    onnx = folder / "function.onnx"
    save(convert(lambda x: (2 * x,), {"x": torch.ones(2, 3)}, ["y"], dynamic=True), onnx)
    plan = onnx.read_bytes()
    sha256, version = hashlib.sha256(plan).hexdigest(), TRT.__version__
    file = EngineFile(folder, sha256, FLAVOR, version, "float32", (1, 4, 8), 1e-4, **described)
    file.path.write_bytes(plan)
    file.write()
    return file


# As a runtime ---------------------------------------------------------------------------------------------------------
def test_trt_runtime_returns_what_its_function_returns() -> None:
    def function(x: Tensor, nothing: None, sigma: Tensor) -> tuple[Tensor, ...]:
        return x / sigma[:, None], (x * x).sum(1)

    example = torch.ones(2, 3, dtype=torch.float64), None, torch.ones(2, dtype=torch.float64)
    engine = RUNTIMES["tensorrt"].build(function, example)
    for seed in range(2):
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        made = engine(x, None, torch.tensor([0.5, 4.0], dtype=torch.float64))
        expected = function(x, None, torch.tensor([0.5, 4.0]))
        assert all(y.dtype == torch.float64 for y in made)
        for mine, reference in zip(made, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


def test_trt_runtime_needs_a_gpu_that_its_library_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RUNTIMES["tensorrt"].missing
    assert missing(torch.device("cpu")) == "TensorRT runs on CUDA only" and missing(CUDA) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing(CUDA) == "TensorRT for RTX does not support this GPU"


def test_trt_runtime_says_why_its_engine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*arguments: Any) -> Any:
        return dataclasses.replace(pretended.build(*arguments), obstacles=["unsupported cc"])

    monkeypatch.setattr(trt_build, "build_engine", built)
    message = refused(lambda: RUNTIMES["tensorrt"].build(lambda x: (2 * x,), [torch.ones(2, 3)]))
    assert message.endswith("builds engines here, but they can't run: unsupported cc")


# Loaded ---------------------------------------------------------------------------------------------------------------
def test_trt_engine_binds_tensors_by_address(tmp_path: Path) -> None:
    loaded = tensorrt.load(doubling(tmp_path).folder)
    assert loaded.device == CUDA and loaded.batch is None
    assert loaded.inputs == {"x": (("batch", 3), torch.float32)}
    x = torch.arange(6, dtype=torch.float64).view(3, 2).T  # neither float32 nor contiguous
    made = loaded({"x": x})
    assert list(made) == ["y"] and made["y"].dtype == torch.float32 and torch.equal(made["y"], 2 * x.float())
    assert "its inputs are x, not z" in refused(lambda: loaded({"z": x}))
    assert "takes batches of 1 to 8 images, not 9" in refused(lambda: loaded({"x": torch.ones(9, 3)}))
    assert "x has shape [2, 4], not ['batch', 3]" in refused(lambda: loaded({"x": torch.ones(2, 4)}))


def test_trt_engine_that_cannot_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = doubling(tmp_path)
    with monkeypatch.context() as patch:
        loaded = tensorrt.load(file.path)
        patch.setattr(pretended.Context, "execute_async_v3", lambda self, stream: False)
        assert refused(lambda: loaded({"x": torch.ones(2, 3)})) == f"{file.path}: the engine failed to run"
    with monkeypatch.context() as patch:
        patch.setattr(pretended.Engine, "create_execution_context", lambda self: None)
        assert "no memory on cuda:0 to run it; build it for a smaller batch" in refused(lambda: tensorrt.load(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(pretended.Engine, "get_tensor_dtype", lambda self, name: TRT.DataType.INT8)
        assert "has a tensor of type DataType.INT8, which PyTorch has not" in refused(lambda: tensorrt.load(tmp_path))
    reasons = TRT.EngineInvalidityDiagnostics.__members__.items()
    name, bit = next((name, bit) for name, bit in reasons if int(bit))
    monkeypatch.setattr(pretended.Runtime, "validity", ("INVALID", int(bit)))
    message = refused(lambda: tensorrt.load(tmp_path, "cuda:0"))
    assert message == f"{file.path}: can't run on {NAME}: {name.lower().replace('_', ' ')}"
    monkeypatch.setattr(pretended.Runtime, "validity", ("INVALID", 0))
    assert refused(lambda: tensorrt.load(tmp_path)).endswith("invalid")


def test_trt_engine_is_judged_by_the_library_where_it_can_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.obstacles(TRT, b"", library.listener(TRT)) == []
    monkeypatch.delattr(pretended.Runtime, "get_engine_validity")  # TensorRT itself does not
    assert library.obstacles(TRT, b"", library.listener(TRT)) == []


def test_trt_engine_tests_itself_on_the_gpu(tmp_path: Path) -> None:
    file = doubling(tmp_path)
    loaded = tensorrt.load(tmp_path)
    loaded.self_test()  # there is none
    for factor, passes in ((2.0, True), (2.01, False)):
        self_test.save(file.self_test, {"x": torch.ones(2, 3)}, {"y": torch.full((2, 3), factor)})
        if passes:
            loaded.self_test()
        else:
            assert "output y is off by 5.0e-03" in refused(loaded.self_test)


# Built ----------------------------------------------------------------------------------------------------------------
def test_trt_script_executes_its_engine_on_the_gpu(file: Path, tmp_path: Path) -> None:
    done = run("--onnx", str(file), "--batch", "1,2,4", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    made = engine_file.read(tmp_path)
    assert (made.parity, made.gpu, made.capability) == (EXECUTED, NAME, "8.9") and max(made.errors.values()) < 1e-6
    assert json.loads((tmp_path / "parity.json").read_text())
    assert "| batch | engine, ms |" in done.output


def test_trt_script_compares_the_engine_of_a_bundle_with_eager_and_compiled(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_build, "compiled", compiled)
    monkeypatch.setattr(cuda_build, "has_triton", lambda: True)
    with ops.kernels("reference"):
        done = run("--bundle", str(small_bundle.folder), "--what", "generator", "--batch", "2", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert engine_file.read(tmp_path).parity == EXECUTED
    assert "| batch | eager, ms | compiled, ms | engine, ms |" in done.output


def test_trt_script_removes_an_engine_that_is_wrong(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = pretended.Context.execute_async_v3

    def wrong(context: pretended.Context, stream: int) -> bool:
        done = execute(context, stream)
        for name in context.outputs:
            context.at(name, context.get_tensor_shape(name)).mul_(1.01)
        return done

    monkeypatch.setattr(pretended.Context, "execute_async_v3", wrong)
    done = run("--onnx", str(file), "--batch", "2", "--out", str(tmp_path))
    assert done.exit_code == 2 and "its self-test fails here" in done.output
    assert not [*tmp_path.glob("*.engine")] and not (tmp_path / "engine.json").exists()


class Config:
    """In place of the builder's configuration, with a timing cache as TensorRT itself has one."""

    def __init__(self, takes: bool = True) -> None:
        self.flags, self._takes, self.hardware_compatibility_level = set[Any](), takes, None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return self._takes and not ignore_mismatch

    def get_timing_cache(self) -> Any:
        return types.SimpleNamespace(serialize=lambda: self.cache + b" and more")


class Builder:
    """In place of the library's, where it stands beside its own network."""

    def __init__(self, config: Config, plan: bytes | None) -> None:
        self._config, self._plan = config, plan

    def create_builder_config(self) -> Config:
        return self._config

    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        return self._plan

    def create_network(self, flags: int) -> Any:
        x = types.SimpleNamespace(name="x", shape=(2, 3))
        return types.SimpleNamespace(num_layers=5, num_inputs=1, get_input=lambda index: x)


def build_with(
    patch: pytest.MonkeyPatch, file: EngineFile, options: Options, config: Config, fails: bool = False
) -> Any:
    """What `builder.build` makes of the file's function; the library, if it does not fail, makes the file's plan."""
    patch.setattr(TRT, "Builder", lambda heard: Builder(config, None if fails else file.plan()))
    parser = types.SimpleNamespace(parse_from_file=lambda path: True)
    patch.setattr(TRT, "OnnxParser", lambda network, heard: parser)
    return trt_builder.build(TRT, "tensorrt", file.folder / "function.onnx", options)


def test_trt_builder_is_told_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config, cache = doubling(tmp_path), Config(), tmp_path / "cache"
    options = Options(
        (2, 2, 2), tf32=True, refit=True, version_compatible=True, hardware_compatible="ampere+", timing_cache=cache
    )
    built = build_with(monkeypatch, file, options, config)
    flags = TRT.BuilderFlag
    assert config.flags == {flags.TF32, flags.REFIT, flags.VERSION_COMPATIBLE}
    assert config.hardware_compatibility_level is TRT.HardwareCompatibilityLevel.AMPERE_PLUS
    assert (config.cache, cache.read_bytes()) == (b"", b" and more")
    assert (built.plan, built.obstacles, built.parsed_layers, built.batch) == (file.plan(), [], 5, (2, 2, 2))
    assert [layer.kind for layer in built.layers] == ["gemm"]
    build_with(monkeypatch, file, options, config)
    assert config.cache == b" and more", "a cache that is there was not taken"
    message = refused(lambda: build_with(monkeypatch, file, options, Config(takes=False)))
    assert message == f"{cache}: not a timing cache of this GPU and version; delete it"


def test_trt_builder_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, plain, refit = doubling(tmp_path), Options((2, 2, 2)), Options((2, 2, 2), refit=True)

    def why(options: Options) -> str:
        return refused(lambda: build_with(monkeypatch, file, options, Config(), fails=True))

    assert why(refit).endswith("function.onnx: the builder failed: no reason given")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why(plain).endswith("no reason given")
    assert why(refit).endswith("no reason given; with --refit this library may need a GPU to build")

    def broken(heard: Any) -> Any:
        raise RuntimeError("no driver\nlong story")

    monkeypatch.setattr(TRT, "Builder", broken)
    message = refused(lambda: trt_builder.build(TRT, "tensorrt", file.folder / "function.onnx", plain))
    assert message.endswith("can't build here: no driver; build on a machine with a GPU")
