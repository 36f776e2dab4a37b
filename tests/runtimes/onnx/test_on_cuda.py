"""ONNX Runtime's CUDA provider, with a stand-in that computes on the CPU: what it is asked for, and its CUDA graphs."""

import importlib.metadata
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import extras
from dgfast.errors import UserError
from dgfast.runtimes.onnx import session
from dgfast.runtimes.onnx.cuda import FUSED, CudaOptions, log, suited
from dgfast.runtimes.onnx.file import said_of, save
from dgfast.runtimes.onnx.session import PROVIDERS, OnnxEngine
from dgfast.runtimes.onnx.writer import convert

CUDA, TENSORRT = PROVIDERS["cuda"], PROVIDERS["tensorrt"]


class OnGpu:
    """The sessions that were made of a pretended ONNX Runtime for GPUs."""

    def __init__(self, on_cpu: Any) -> None:
        self._on_cpu = on_cpu
        self.options: list[dict[str, Any]] = []
        self.refuses_graphs = self.fails_to_capture = self.lacks_libraries = False
        self.bound: list[tuple[int, ...]] = []
        self.severities: list[int] = []

    def make(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        wanted = dict(providers)
        self.options.append(wanted)
        captures = bool(wanted[CUDA].get("enable_cuda_graph")) if CUDA in wanted else False
        if captures and self.refuses_graphs:
            raise RuntimeError("This session cannot use the CUDA graph feature\nand more")
        inner = self._on_cpu(path, options, providers=["CPUExecutionProvider"])
        started = ["CPUExecutionProvider"] if self.lacks_libraries else list(wanted)
        return SimpleNamespace(
            get_providers=lambda: started, get_inputs=inner.get_inputs, get_outputs=inner.get_outputs,
            get_modelmeta=inner.get_modelmeta, io_binding=lambda: Binding(self, inner),
            run_with_iobinding=lambda binding: binding.run(captures),
        )  # fmt: skip


class Binding:
    def __init__(self, gpu: OnGpu, inner: Any) -> None:
        self._gpu, self._session, self._binding, self._places = gpu, inner, inner.io_binding(), list[int]()

    def bind_input(self, *place: Any) -> None:
        self._places.append(place[-1])
        self._binding.bind_input(*place)

    def bind_output(self, *place: Any) -> None:
        self._places.append(place[-1])
        self._binding.bind_output(*place)

    def run(self, captures: bool) -> None:
        if captures and self._gpu.fails_to_capture:
            raise RuntimeError("capture failed")
        self._gpu.bound.append(tuple(self._places))
        self._session.run_with_iobinding(self._binding)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    import onnxruntime

    pretended = OnGpu(onnxruntime.InferenceSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", pretended.severities.append)
    monkeypatch.setattr(onnxruntime, "InferenceSession", pretended.make)
    return pretended


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


def doubling(path: Path, batch: int | None = 2, **said: str) -> Path:
    model = convert(lambda x: (2 * x,), {"x": torch.ones(batch or 2, 3)}, ["y"], dynamic=batch is None)
    for key, value in said.items():
        model.metadata_props.add(key=key.rstrip("_"), value=value)
    save(model, path)
    return path


def x_of(value: float, batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.full((batch, 3), value)}


# CUDA graphs ----------------------------------------------------------------------------------------------------------
def test_onnx_graph_reads_and_writes_the_same_memory_in_every_call(gpu: OnGpu, tmp_path: Path) -> None:
    engine = OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda")
    results = [engine(x_of(value))["y"] for value in (1.0, 2.0, 3.0)]
    assert [float(y[1, 2]) for y in results] == [2.0, 4.0, 6.0]  # and none was overwritten by the next
    assert len(set(gpu.bound)) == 1 and gpu.options[0][CUDA]["enable_cuda_graph"] == 1
    assert gpu.severities == [4]


def test_onnx_graph_is_for_files_of_one_batch_size(gpu: OnGpu, tmp_path: Path) -> None:
    engine = OnnxEngine(doubling(tmp_path / "f.onnx", batch=None), provider="cuda")
    assert [engine(x_of(1.0, batch))["y"].shape[0] for batch in (2, 5)] == [2, 5]
    assert gpu.options[0][CUDA]["enable_cuda_graph"] == 0 and len(set(gpu.bound)) == 2
    OnnxEngine(doubling(tmp_path / "g.onnx"), provider="tensorrt")
    assert gpu.options[1][TENSORRT] == {"device_id": 0} and gpu.options[1][CUDA]["enable_cuda_graph"] == 0


@pytest.mark.parametrize("when", ["refuses_graphs", "fails_to_capture"])
def test_onnx_without_its_graph_computes_all_the_same_and_says_so(
    gpu: OnGpu, tmp_path: Path, warned: list[str], when: str
) -> None:
    setattr(gpu, when, True)
    engine = OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda")
    assert float(engine(x_of(3.0))["y"][0, 0]) == 6.0
    assert [options[CUDA]["enable_cuda_graph"] for options in gpu.options] == [1, 0]
    (line,) = warned
    assert "does not capture it in a CUDA graph" in line and "and more" not in line


def test_onnx_that_fails_without_a_graph_too_is_one_line(
    gpu: OnGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda", cuda=CudaOptions(graph=False))

    def run(self: Binding, captures: bool) -> None:
        raise RuntimeError("out of memory\nlong story")

    monkeypatch.setattr(Binding, "run", run)
    with pytest.raises(UserError, match=r"ONNX Runtime failed: out of memory$"):
        engine(x_of(1.0))


def test_onnx_waits_for_torch_before_its_own_stream_reads(
    gpu: OnGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda")
    waited: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(torch.device("cuda", 1)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    engine.device = torch.device("cuda", 1)
    assert engine._place(torch.ones(2, 3))[:2] == ("cuda", 1)
    x, y = torch.ones(2, 3), torch.empty(2, 3)
    monkeypatch.setattr(engine, "_place", lambda t: ("cpu", 0, "float32", tuple(t.shape), t.data_ptr()))
    monkeypatch.setattr(Binding, "run", lambda self, captures: None)
    monkeypatch.setattr(Binding, "bind_input", lambda self, *place: None)
    monkeypatch.setattr(Binding, "bind_output", lambda self, *place: None)
    engine._run({"x": x}, {"y": y})
    assert waited == [torch.device("cuda", 1)]


def test_onnx_has_no_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert session._numbered(torch.device("cuda")) == torch.device("cuda", 3)
    assert session._numbered(torch.device("cuda", 1)) == torch.device("cuda", 1)


# Options --------------------------------------------------------------------------------------------------------------
def test_onnx_takes_tensor_cores_where_products_are_half(warned: list[str]) -> None:
    """Without TF32 the provider has none for half precision either; in float32 it rounds as torch does."""
    assert not suited({"dtype": "float32"}).tensor_cores and not warned
    torch.set_float32_matmul_precision("high")
    try:
        assert suited({"dtype": "float32"}).tensor_cores
    finally:
        torch.set_float32_matmul_precision("highest")
    assert suited({"dtype": "fp16"}).tensor_cores and len(warned) == 1
    assert [suited({"batch": batch}).graph for batch in ("1", "dynamic", "")] == [True, False, False]
    assert suited({"for": FUSED}).nhwc and not suited({"for": "onnxruntime"}).nhwc


def test_onnx_options_by_the_names_of_the_provider() -> None:
    assert CudaOptions(nhwc=True, search="HEURISTIC").provider_options() == {
        "use_tf32": 0, "enable_cuda_graph": 1, "prefer_nhwc": 1, "cudnn_conv_algo_search": "HEURISTIC"
    }  # fmt: skip


def test_onnx_asks_for_what_the_file_says_of_itself(gpu: OnGpu, tmp_path: Path, warned: list[str]) -> None:
    path = doubling(tmp_path / "f.onnx", for_=FUSED)
    OnnxEngine(path, provider="cuda")
    assert gpu.options[0][CUDA]["prefer_nhwc"] == 1
    with pytest.raises(UserError, match=r"is for ONNX Runtime's CUDA provider alone; export another without --for"):
        OnnxEngine(path)
    half = torch.ones(3, 3, dtype=torch.float16)
    model = convert(lambda x: ((x.half() @ half).float(),), {"x": torch.ones(2, 3)}, ["y"])
    save(model, tmp_path / "half.onnx")
    assert said_of(tmp_path / "half.onnx") == {"batch": "2", "dtype": "fp16"}
    OnnxEngine(tmp_path / "half.onnx", provider="cuda")
    assert gpu.options[1][CUDA]["use_tf32"] == 1 and len(warned) == 1


def test_onnx_warning_reaches_a_user_who_set_up_no_logging() -> None:
    assert log.name == "dgfast" and log.isEnabledFor(logging.WARNING)


def test_onnx_runtime_is_never_the_cpu_in_disguise(gpu: OnGpu, tmp_path: Path) -> None:
    options = CudaOptions(graph=False)
    first, second = session.providers("tensorrt", torch.device("cuda", 1), options)
    assert first == (TENSORRT, {"device_id": 1}) and second == (CUDA, {"device_id": 1} | options.provider_options())
    assert session.providers("cpu", torch.device("cpu"), options) == [(PROVIDERS["cpu"], {})]
    gpu.lacks_libraries = True
    with pytest.raises(UserError, match="CUDAExecutionProvider of ONNX Runtime did not start, only CPUExecution"):
        OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda")
    assert len(gpu.options) == 1  # nor is a CUDA graph blamed for it


@pytest.mark.parametrize(
    ("installed", "remedy"),
    [
        ([], "pip install 'dgfast[onnx-gpu]', or"),
        (["onnxruntime"], "pip uninstall onnxruntime, then pip install 'dgfast[onnx-gpu]', or"),
        (["onnxruntime-gpu"], "pip install 'dgfast[onnx-gpu]', or"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "onnxruntime and onnxruntime-gpu share a folder and break each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'dgfast[onnx-gpu]', or",
        ),
    ],
)
def test_onnx_says_how_to_come_by_the_one_for_gpus(
    installed: list[str], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> object:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(extras, "distribution", distribution)
    with pytest.raises(UserError) as refused:
        OnnxEngine(doubling(tmp_path / "f.onnx"), provider="cuda")
    assert refused.value.message == f"this ONNX Runtime has no cuda provider (it has cpu): {remedy} use --device cpu"


# What a file says -----------------------------------------------------------------------------------------------------
def test_onnx_file_says_what_it_is_without_being_read_whole(tmp_path: Path) -> None:
    path = doubling(tmp_path / "f.onnx", batch=None, long="x" * 10_000, short="y")
    assert said_of(path) == {"batch": "dynamic", "dtype": "float32", "short": "y"}


def test_onnx_file_that_is_damaged_says_less(tmp_path: Path) -> None:
    content, path = doubling(tmp_path / "f.onnx", short="y").read_bytes(), tmp_path / "g.onnx"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert set(said_of(path)) <= {key[:length] for key in ("batch", "dtype", "short") for length in range(6)}
    for damaged in (b"\0" * 9, b"\x70\xff" * 9, b"\x72\x03\x0a\x00\x12", b"\x72" + b"\xff" * 12, b"\x72\x02\x12\x00"):
        path.write_bytes(damaged)
        assert said_of(path) in ({}, {"": ""})
