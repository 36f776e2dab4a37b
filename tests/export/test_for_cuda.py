"""`export/to_onnx.py --for onnxruntime-cuda`: operators of that provider, proved by a copy in ONNX's own."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import onnx_file
from dgfast.export.subject import Joint
from dgfast.runtimes.onnx.cuda import FUSED
from dgfast.runtimes.onnx.file import said_of
from dgfast.runtimes.onnx.session import OnnxEngine
from tests.support.export import export


@pytest.mark.parametrize(("dtype", "batch"), [("float32", "dynamic"), ("fp16", "2")])
def test_export_for_cuda_is_proved_and_says_that_it_never_ran(
    bundle: Bundle, tmp_path: Path, dtype: str, batch: str
) -> None:
    options = ["--for", FUSED, "--dtype", dtype, "--batch", batch, "--out", str(tmp_path)]
    done = export("--bundle", str(bundle.folder), *options)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.onnx")
    model = onnx.load(path)
    assert {node.op_type for node in model.graph.node if node.domain} == {"GroupNorm", "SkipGroupNorm"}
    said = said_of(path)
    assert (said["for"], said["dtype"], said["batch"]) == (FUSED, dtype, batch) and "self_test" in {
        entry.key for entry in model.metadata_props
    }
    report = json.loads(path.with_suffix(".parity.json").read_text())
    assert report["passed"] and report["run on"] is None and report["compared"] == "a copy in ONNX's operators"
    assert any("rounded as on a GPU" in row["case"] for row in report["rows"]) == (dtype == "fp16")
    with pytest.raises(UserError, match="is for ONNX Runtime's CUDA provider alone"):
        OnnxEngine(path)


def test_export_for_cuda_runs_its_self_test_where_there_is_a_gpu(
    subject: Joint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrongOnGpus(OnnxEngine):
        def __init__(self, path: Path, device: str = "cpu", **options: Any) -> None:
            if device == "cuda":
                raise UserError("its self-test fails here")
            super().__init__(path, device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnx_file, "OnnxEngine", WrongOnGpus)
    path = tmp_path / "f.onnx"
    with pytest.raises(UserError, match="its self-test fails here"):
        onnx_file.export(subject, path, batch=1, dtype="float32", opset=18, metadata={}, target=FUSED)
    assert not path.exists()
