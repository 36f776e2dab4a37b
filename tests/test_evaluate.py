"""The door `python -m dgfast.evaluate`: perfect copies score perfectly, noise scores badly."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dgfast.evaluate import main
from dgfast.outputs import write_images
from dgfast.training.data import load_images, split


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> str:
    write_images(folder, images, range(len(images)), labels)
    return str(folder)


def test_evaluate_orders_copies_training_digits_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.evaluate._YARDSTICK", 300)
    _, held_out = split(load_images("mnist"), 300)
    noise = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 1), dtype=np.uint8)
    copies = _write(tmp_path / "copies", held_out.images, held_out.labels)
    worst = _write(tmp_path / "noise", noise, np.zeros(100, dtype=np.int64))
    report = tmp_path / "report.json"
    result = CliRunner().invoke(main, [copies, worst, "--holdout", "300", "--device", "cpu", "--json", str(report)])
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())
    assert abs(rows[copies]["frechet"]) < 1e-3 < rows["training images"]["frechet"] < rows[worst]["frechet"] / 10
    assert rows[copies]["precision"] == rows[copies]["recall"] == rows[copies]["coverage"] == 1
    assert rows[worst]["precision"] < 0.1 and rows["training images"]["precision"] > 0.8
    assert rows[worst]["log_ratio"] < rows["training images"]["log_ratio"]
    assert len(result.output.strip().splitlines()) == 4


def test_evaluate_bad_input_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 2 and "no npz files" in result.output
