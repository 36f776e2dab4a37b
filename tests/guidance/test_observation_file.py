"""The file of what is known: what may stand in it, what is refused, and that its content belongs to the job."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dgfast import bundle as bundles
from dgfast import sample
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.export import to_onnx
from dgfast.guidance.observation_file import read
from dgfast.image_folder import read_images
from dgfast.runtimes.onnx.session import OnnxEngine

RNG = np.random.default_rng(0)
PIXELS, MASK = RNG.integers(256, size=(8, 8, 1), dtype=np.uint8), RNG.random((8, 8)) < 0.5


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_file_is_read_in_the_networks_units_and_unknown_pixels_are_nothing(tmp_path: Path) -> None:
    wanted = np.where(MASK[..., None], PIXELS / 127.5 - 1, 0).transpose(2, 0, 1)
    floats = np.where(MASK[..., None], PIXELS / 127.5 - 1, np.nan)
    for arrays in (
        {"image": PIXELS, "mask": MASK},
        {"image": PIXELS[..., 0], "mask": MASK[..., None].astype(np.float32)},
        {"image": floats, "mask": MASK.astype(np.int64), "other": np.array(3)},
    ):
        image, mask = read(npz(tmp_path / "o.npz", **arrays), (1, 8, 8))
        assert image.dtype == torch.float64 and np.allclose(image, wanted)
        assert np.array_equal(mask[0], MASK)
    colours = RNG.integers(256, size=(8, 8, 3), dtype=np.uint8)
    image, mask = read(npz(tmp_path / "o.npz", image=colours, mask=MASK), (3, 8, 8))
    assert image.shape == mask.shape == (3, 8, 8) and np.array_equal(mask[2], MASK)


def _pickled(path: Path) -> None:
    np.savez(path, image=np.array([{}], dtype=object), mask=MASK, allow_pickle=True)


def _huge(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (8, 8, 1 << 40)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", header.getvalue())


def _nested(path: Path) -> None:
    text = b"(" * 60_000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def _torn(path: Path) -> None:
    np.savez_compressed(path, image=PIXELS, mask=MASK)
    content = bytearray(path.read_bytes())
    content[90:140] = bytes(50)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "cannot read .*: No such file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_text("text"), "no npz of an image and a mask .*not a zip file"),
        (lambda path: npz(path, image=PIXELS), "no item named 'mask.npy'"),
        (lambda path: npz(path, image=PIXELS[:4], mask=MASK), r"image has the shape \[4, 8, 1\]; give \[8, 8, 1\] or"),
        (lambda path: npz(path, image=PIXELS, mask=MASK[:, :4]), r"mask has the shape \[8, 4\]"),
        (lambda path: npz(path, image=PIXELS.astype(np.int32), mask=MASK), "image is of int32; give one of uint8"),
        (lambda path: npz(path, image=PIXELS, mask=MASK * 2.0), "the mask must have 1 for what is known"),
        (lambda path: npz(path, image=PIXELS, mask=MASK & False), "and know something"),
        (lambda path: npz(path, image=np.full((8, 8), np.inf), mask=MASK), "no finite numbers where the mask"),
        (
            lambda path: npz(path, image=PIXELS.astype(float), mask=MASK),
            r"the image reaches 2\d\d; floating numbers.* units.*: give pixels from 0 to 255 as uint8",
        ),
        (_pickled, "image is of object"), (_huge, "image has the shape"), (_nested, "no npz"), (_torn, "no npz"),
    ],
)  # fmt: skip
def test_file_of_something_else_is_refused_in_one_line(
    make: Callable[[Path], object], line: str, tmp_path: Path
) -> None:
    make(tmp_path / "o.npz")
    with pytest.raises(UserError, match=line) as refused:
        read(tmp_path / "o.npz", (1, 8, 8))
    assert "\n" not in refused.value.message and str(tmp_path) in refused.value.message


def test_file_beyond_its_bound_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.bounds.OBSERVATION_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        read(npz(tmp_path / "o.npz", image=PIXELS, mask=MASK), (1, 8, 8))


def test_no_bundle_names_a_file(small_bundle: Bundle, tmp_path: Path) -> None:
    bundles.write(replace(small_bundle, folder=tmp_path, guidance=GuidanceConfig(observe="/etc/passwd")))
    with pytest.raises(UserError, match="observe names a file of its own: give it on the command line"):
        bundles.read(tmp_path)
    with pytest.raises(UserError, match="observe 3 is not the name of a file"):
        GuidanceConfig(observe=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--observe-gamma", "0.2"], "the least that is safe for this operator is 1"),
        (["--observe-method", "dps", "--observe-gamma", "1"], "observe_gamma is of sda and tmpd"),
        (["--observe-iterations", "2"], "observe_iterations is of mmps and pigdm"),
        (["--observe-iterations", "51", "--observe-method", "mmps"], "a backward pass of the score net in each"),
        (["--observe-weight", "0"], "observe does nothing without observe_weight, which turns guidance by an obs"),
        (["--observe-std", "-1"], "at least 0"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    options: list[str], line: str, small_bundle: Bundle, tmp_path: Path
) -> None:
    known = npz(tmp_path / "o.npz", image=PIXELS, mask=MASK)
    command = ["--bundle", str(small_bundle.folder), "--observe", str(known), "--device", "cpu", *options]
    done = CliRunner().invoke(sample.main, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and line in done.output and not (tmp_path / "out").exists()


def test_observation_is_sampled_resumed_exported_and_run(small_bundle: Bundle, tmp_path: Path) -> None:
    known = npz(tmp_path / "o.npz", image=PIXELS, mask=MASK)
    common = ["--bundle", str(small_bundle.folder), "--seeds", "0-3", "--device", "cpu"]
    observed = [*common, "--observe", str(known), "--observe-std", "0.01"]

    def draw(name: str, options: list[str]) -> np.ndarray:
        done = CliRunner().invoke(sample.main, [*options, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        return read_images(tmp_path / name)[0].astype(int)

    def error(images: np.ndarray) -> float:
        return float(np.abs(images - PIXELS)[:, MASK].mean())

    plain, eager = draw("plain", common), draw("eager", observed)
    assert error(eager) < 0.9 * error(plain)  # of a network that has learnt nothing
    checksum = json.loads((tmp_path / "eager" / "manifest.json").read_text())["job"]["guidance"]["observe"]
    assert len(checksum) == 64
    other = npz(tmp_path / "other.npz", image=255 - PIXELS, mask=MASK)

    file = ["--bundle", str(small_bundle.folder), "--observe", str(other), "--observe-std", "0.01"]
    done = CliRunner().invoke(to_onnx.main, [*file, "--out", str(tmp_path / "f")])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "f").glob("*.onnx")
    inputs = ["x", "sigma", "class_labels", "observe_weight", "observed", "observed_where"]
    assert list(OnnxEngine(path).inputs) == inputs and str(tmp_path) not in OnnxEngine(path).metadata["guidance"]
    engine = ["--runtime", "onnx", "--engine", str(path)]
    assert np.abs(draw("onnx", [*observed, *engine]) - eager).max() <= 1  # whatever it was exported with
    assert np.abs(draw("off", [*common, *engine]) - plain).max() <= 1

    known.write_bytes(other.read_bytes())  # under the same name
    done = CliRunner().invoke(sample.main, [*observed, "--out", str(tmp_path / "eager")])
    assert done.exit_code == 2 and f"observe {checksum[:37]}... there" in done.output
