"""Images on disk: what is written can be read back, and nothing that is there gets lost."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgfast.errors import UserError
from dgfast.outputs import GRID_IMAGES, Writer, read_shards, save_grid, to_uint8


def _images(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def test_outputs_pixels_map_the_range_and_clip() -> None:
    values = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_outputs_pixels_round_trip_through_the_training_scale() -> None:
    pixels = torch.arange(256).view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(pixels / 127.5 - 1).ravel(), np.arange(256))


@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_shards_round_trip(tmp_path: Path, channels: int) -> None:
    images = _images(10, channels)
    writer = Writer(tmp_path / "new" / "out", ["png", "npz"])
    writer.add(images[:7], range(7), np.arange(7))
    writer.add(images[7:], range(7, 10), np.arange(7, 10))
    writer.finish({"seconds": 1.5, "S_max": math.inf})
    read, labels = read_shards(tmp_path / "new" / "out")
    assert np.array_equal(read, images) and labels.tolist() == list(range(10))
    with np.load(tmp_path / "new" / "out" / "images-00001.npz") as shard:
        assert shard["seeds"].tolist() == [7, 8, 9] and shard["images"].dtype == np.uint8
    assert json.loads((tmp_path / "new" / "out" / "manifest.json").read_text()) == {"seconds": 1.5, "S_max": "inf"}


def test_outputs_unlabelled_images_say_minus_one(tmp_path: Path) -> None:
    writer = Writer(tmp_path, ["npz"])
    writer.add(_images(2), [5, 6], None)
    assert read_shards(tmp_path)[1].tolist() == [-1, -1]


def test_outputs_grid_shows_image_k_at_row_major_place_k(tmp_path: Path) -> None:
    images = _images(5)
    save_grid(images, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        sheet = np.asarray(file)
    assert sheet.shape == (16, 24)
    for k, image in enumerate(images):
        row, column = divmod(k, 3)
        assert np.array_equal(sheet[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8], image[..., 0])
    assert not sheet[8:, 16:].any()


def test_outputs_only_the_asked_formats_are_written(tmp_path: Path) -> None:
    for formats, expected in (
        (["png"], {"grid.png", "manifest.json"}),
        (["npz"], {"images-00000.npz", "manifest.json"}),
    ):
        folder = tmp_path / formats[0]
        writer = Writer(folder, formats)
        writer.add(_images(2), [0, 1], None)
        writer.finish({})
        assert {path.name for path in folder.iterdir()} == expected


def test_outputs_memory_holds_the_grid_at_most(tmp_path: Path) -> None:
    writer = Writer(tmp_path, ["png", "npz"])
    for start in range(0, 3 * GRID_IMAGES, GRID_IMAGES // 2):
        writer.add(_images(GRID_IMAGES // 2), range(start, start + GRID_IMAGES // 2), None)
    assert sum(len(batch) for batch in writer._shown) == GRID_IMAGES


def test_outputs_a_used_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds precious\.txt"):
        Writer(tmp_path, ["png"])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_outputs_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="can't be written"):
        Writer(tmp_path / "out", ["png"])
    assert (tmp_path / "out").read_text() == "a file"


def test_outputs_foreign_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no npz files"):
        read_shards(tmp_path)
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz"):
        read_shards(tmp_path)
