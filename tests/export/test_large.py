"""Files whose weights are beside them because protobuf takes no more than 2 GB; here the limit is a thousand bytes."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import proof, to_onnx
from dgfast.image_folder import read_images
from dgfast.runtimes.onnx.file import data_of, files_of, save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.sample import main as sample


@pytest.fixture(autouse=True)
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.runtimes.onnx.file.LIMIT", 1000)


def export(bundle: Bundle, out: Path, *options: str) -> Result:
    return CliRunner().invoke(to_onnx.main, ["--bundle", str(bundle.folder), "--out", str(out), *options])


def product(size: int) -> Any:
    """A model with size * size weights."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return convert(lambda x: (x @ weight,), {"x": torch.ones(2, size)}, ["y"])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        OnnxEngine(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_large_export_is_a_file_and_its_weights_which_sample_as_one(small_bundle: Bundle, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over the first
        done = export(small_bundle, tmp_path, "--batch", "2")
        assert done.exit_code == 0, done.output
    path = tmp_path / "small-denoiser-b2-float32.onnx"
    assert f"{path}: 0." in done.output and f"{data_of(path)}: 0." in done.output
    assert names(tmp_path) == sorted(
        [path.name, data_of(path).name, *(f"{path.stem}.parity.{k}" for k in ("json", "txt"))]
    )
    weights = sum(p.numel() for p in small_bundle.load("score").parameters())
    assert 3.5 * weights < data_of(path).stat().st_size < 4.5 * weights, "each weight once"
    assert OnnxEngine(path).metadata["weights_sha256"] == small_bundle.fingerprint()
    drawn = []
    for options in ([], ["--runtime", "onnx", "--engine", str(path)]):
        out = tmp_path / f"drawn-{len(options)}"
        job = [
            "--bundle",
            str(small_bundle.folder),
            "--seeds",
            "0-3",
            "--batch",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
        done = CliRunner().invoke(sample, [*job, *options])
        assert done.exit_code == 0, done.output
        drawn.append(read_images(out)[0].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_large_export_that_fails_leaves_neither_file(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(proof.TOLERANCES, "float32", 1e-12)
    done = export(small_bundle, tmp_path, "--batch", "1")
    assert done.exit_code == 1 and "differs by" in done.output
    assert [name.partition(".")[2] for name in names(tmp_path)] == ["parity.json", "parity.txt"]


def test_large_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.onnx"
    for size, files in ((32, ["f.onnx", "f.onnx.data"]), (8, ["f.onnx"]), (16, ["f.onnx", "f.onnx.data"])):
        save(product(size), path)
        assert names(tmp_path) == files == [file.name for file in files_of(path)]
        assert OnnxEngine(path)({"x": torch.ones(2, size)})["y"].shape == (2, size)
    mode = os.umask(0o22)
    os.umask(mode)
    assert {file.stat().st_mode & 0o777 for file in files_of(path)} == {0o666 & ~mode}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save(product(32), tmp_path / "g.onnx")
    assert names(tmp_path) == ["f.onnx", "f.onnx.data"]


def test_large_file_without_its_weights_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    save(product(32), path)
    whole = data_of(path).read_bytes()
    data_of(path).write_bytes(whole[:-4])
    assert "its weights are in f.onnx.data beside it, which is not the one that was written with it" in refused(path)
    data_of(path).unlink()
    assert "its weights are in f.onnx.data beside it, which is missing; copy both together" in refused(path)
