"""Writing and proving a file, on a function of one matrix: what is written, what is said of it, what is left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.export import onnx_file
from dgfast.export.parity import ParityError, Report
from dgfast.export.subject import Joint
from dgfast.runtimes.onnx.session import OnnxEngine

MATRIX = torch.randn(16, 16, generator=torch.Generator().manual_seed(5)) / 4
ABOUT = {"bundle": "small", "what": "denoiser", "weights_sha256": "abc", "commit": "def", "class_names": "[]"}


def product(x: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    turned = (x.flatten(1).float() @ MATRIX).view_as(x)
    return (weight.view(-1, 1, 1, 1) * turned).to(x.dtype), 0 * sigma


def subject(function: Any = product) -> Joint:
    names = ("x", "sigma", "dg_weight"), ("denoised", "log_ratio")
    return Joint("denoiser", function, *names, {"dg_weight": 0.5}, (3.0, 0.5, 0.0), (1, 4, 4), 0)


def write(path: Path, batch: int | None = None, dtype: str = "float32", function: Any = product) -> tuple[Report, str]:
    said: list[str] = []
    report = onnx_file.export(
        subject(function), path, batch=batch, dtype=dtype, opset=18, metadata=dict(ABOUT), say=said.append
    )
    (line,) = said
    return report, line


@pytest.mark.parametrize(("batch", "sizes"), [(None, {1, 5}), (3, {3})])
def test_file_has_its_proof_and_its_report_beside_it(tmp_path: Path, batch: int | None, sizes: set[int]) -> None:
    path = tmp_path / "f.onnx"
    report, line = write(path, batch)
    report.check()
    engine = OnnxEngine(path)
    engine.self_test()
    assert engine.batch == batch and list(engine.inputs) == ["x", "sigma", "dg_weight"]
    assert {int(row.case.split()[1].rstrip(",")) for row in report.rows if row.case.startswith("batch")} == sizes
    assert report.rows[-1].case == "all 2 steps, share of the pixel range"
    metadata = engine.metadata
    assert {**metadata, **ABOUT} == metadata and (metadata["opset"], metadata["dtype"]) == ("18", "float32")
    assert json.loads(metadata["parity"]) == report.worst and set(report.worst) == {"denoised", "log_ratio", "x"}
    assert line.startswith(f"{metadata['nodes']} nodes: ") and "MatMul" in line
    saved = json.loads((tmp_path / "f.parity.json").read_text())
    assert saved["passed"] is True and len(saved["rows"]) == len(report.rows)
    assert {key: saved[key] for key in ("bundle", "what", "weights_sha256", "commit", "dtype")} == {
        **{key: ABOUT[key] for key in ("bundle", "what", "weights_sha256", "commit")}, "dtype": "float32"
    }  # fmt: skip
    assert sum(saved["nodes"].values()) == int(metadata["nodes"])
    assert (tmp_path / "f.parity.txt").read_text() == report.table()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.onnx", "f.parity.json", "f.parity.txt"]


def test_file_that_is_wrong_is_removed_and_its_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def drifting(x: Tensor, sigma: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What was traced is not what it says later."""
        nonlocal calls
        calls += 1
        turned, ratio = product(x, sigma, weight)
        return (turned if calls < 3 else 1.5 * turned), ratio

    with pytest.raises(ParityError, match="differs by") as caught:
        write(tmp_path / "f.onnx", function=drifting)
    assert caught.value.exit_code == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.parity.json", "f.parity.txt"]
    assert not json.loads((tmp_path / "f.parity.json").read_text())["passed"]
    monkeypatch.setattr(onnx_file, "_signature_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "g.onnx")
    assert not (tmp_path / "g.onnx").exists()  # nor one that nobody has proved


def test_file_in_half_precision_is_judged_as_a_gpu_rounds_too(tmp_path: Path) -> None:
    report, _ = write(tmp_path / "f.onnx", batch=2, dtype="fp16")
    assert "all 2 steps, share of the pixel range, 90% of the images" in {row.case for row in report.rows}
    rounded = [row for row in report.rows if row.case.endswith(", rounded as on a GPU")]
    assert len(rounded) * 2 == len(report.rows)
    assert {row.tolerance for row in rounded} == {2e-2, 1e-2}
    metadata = OnnxEngine(tmp_path / "f.onnx").metadata
    assert metadata["dtype"] == "fp16" and json.loads(metadata["self_test"])["tolerance"] == pytest.approx(0.2)
    assert not any("rounded" in row.case for row in write(tmp_path / "g.onnx", batch=2)[0].rows)
