"""A small ONNX file, and its engine."""

from pathlib import Path

import onnx
import pytest

from dgfast.runtimes.tensorrt import file as engine_file
from dgfast.runtimes.tensorrt.file import EngineFile


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tensorrt import graph  # which skips where there is no TensorRT for RTX

    path = tmp_path_factory.mktemp("onnx") / "test.onnx"
    onnx.save(graph(), path)
    return path


@pytest.fixture(scope="module")
def engine(file: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineFile:
    """An engine folder as `export/to_trt.py` leaves it."""
    from tests.support.tensorrt import run

    out = tmp_path_factory.mktemp("engine") / "out"
    done = run("--onnx", str(file), "--batch", "1,4,8", "--out", str(out))
    assert done.exit_code == 0, done.output
    return engine_file.read(out)
