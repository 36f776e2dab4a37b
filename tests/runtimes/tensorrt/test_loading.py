"""Engines on disk and in memory: what is refused before it is loaded, and what is called afterwards."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dgfast.runtimes.tensorrt import engine as tensorrt
from dgfast.runtimes.tensorrt import library as tensorrt_library
from dgfast.runtimes.tensorrt.file import EngineFile
from dgfast.runtimes.tensorrt.library import deserialize, find, listener, obstacles
from tests.support.tensorrt import CPU_ONLY, FLAVOR, TRT, refused


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


_LEFT_TO_THE_COLLECTOR = """
import gc
from dgfast.runtimes.tensorrt.library import find, listener

_, trt = find("tensorrt-rtx")
gc.disable()
circle = [trt.Runtime(listener(trt))]
circle.append(circle)
del circle
heard = listener(trt)
log = type(heard).log

def collects(*arguments):
    gc.collect()  # as Python may, wherever an object is made
    log(*arguments)

type(heard).log = collects
assert trt.Runtime(heard).deserialize_cuda_engine(b"no engine" * 99) is None and heard.errors()
"""


def test_trt_library_does_not_wait_for_a_runtime_that_the_collector_ends() -> None:
    """In a process of its own, which would never end."""
    done = subprocess.run([sys.executable, "-c", _LEFT_TO_THE_COLLECTOR], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_trt_listener_has_heard_nothing_of_the_call_before() -> None:
    heard = listener(TRT)
    heard.log(TRT.ILogger.Severity.ERROR, "out of cheese")
    heard.log(TRT.ILogger.Severity.INFO, "Layers:\nName: a, LayerType: b")
    assert heard.errors() == ["out of cheese"] and heard.layers
    again = listener(TRT)
    assert again is heard and not again.complaints and not again.layers


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
