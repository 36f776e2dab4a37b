"""The studies `drift` and `formats`: how far a number format leads from float32; `full_size_onnx`: large files."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.studies import formats, full_size_onnx
from benchmarks.studies.drift import main
from dgfast import bundle as bundles
from tests.support.export import write_bundle


def drifts(precision: str) -> list[list[float]]:
    """sigma, error of a call, drift of the run: a row a step."""
    arguments = ["--workload", "tiny", "--count", "2", "--device", "cpu", "--precision", precision]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.strip("| ").split("|") for line in result.output.splitlines()[2:]]
    assert len(lines) == 5  # four steps and the images
    return [[float(cell) for cell in line[1:] if cell.strip()] for line in lines]


def test_drift_of_float32_from_itself_is_none() -> None:
    assert all(value == 0 for row in drifts("float32") for value in row[1:])


def test_drift_of_bfloat16_begins_with_the_first_call() -> None:
    rows = drifts("bf16")
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    assert all(0 < row[1] < 1 for row in rows[:-1])
    assert rows[0][-1] == 0 and all(0 < row[-1] < 1 for row in rows[1:])


def test_formats_compares_images_of_the_same_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, float]]:
        assert all(list(folder.glob("*.npz")) for folder in folders)
        return [{"frechet": float(i)} for i in range(len(folders))]

    small = write_bundle(tmp_path / "small", ("score", "discriminator"))
    monkeypatch.setattr(bundles, "read", lambda name: small)  # in place of mnist32
    monkeypatch.setattr(formats, "judged", judged)  # takes a minute, and judges digits by the thousand
    result = CliRunner().invoke(formats.main, ["--count", "2", "--batch", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    table = [line.strip("| ").split("|") for line in result.output.splitlines() if line.startswith("|")]
    cells = {row[0].strip(): row[2:] for row in table[2:]}
    assert list(cells) == ["float32", "bf16", "fp16 file", "float32, other seeds"]
    exact, bf16, fp16, other = (row[0].strip() for row in cells.values())
    assert float(exact) == 0 < float(fp16) < min(0.01, float(bf16)) and not other


def test_full_size_onnx_proves_a_workload_and_says_what_it_took(tmp_path: Path) -> None:
    result = CliRunner().invoke(full_size_onnx.main, ["--workload", "tiny", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for said in ("tiny: 0.2 million weights", "sigma 0.5, amplified", "tiny-denoiser-b1-float32.onnx: 1.6 MB", "GiB"):
        assert said in result.output
    assert (tmp_path / "tiny-denoiser-b1-float32.onnx").is_file()
