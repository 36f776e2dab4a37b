"""Images on disk: every format keeps every image, and what is written can be read back."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from dgfast.chunks import Chunk
from dgfast.errors import UserError
from dgfast.image_folder import read_images
from dgfast.outputs import (
    FORMATS,
    Drawn,
    Fetcher,
    as_pixels,
    fetch,
    save_grid,
    to_uint8,
    write_adm,
    write_images,
)
from dgfast.ranges import Ranges


def _images(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def _write(folder: Path, name: str, drawn: Drawn) -> None:
    for path, content in zip(FORMATS[name].paths(drawn.chunk), FORMATS[name].encode(drawn), strict=True):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)


def test_outputs_pixels_map_the_range_and_clip() -> None:
    values = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_outputs_pixels_round_trip_through_the_training_scale() -> None:
    pixels = torch.arange(256).view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(pixels / 127.5 - 1).ravel(), np.arange(256))


def test_outputs_fetch_what_the_formats_keep() -> None:
    latents = torch.randn(3, 4, 2, 2)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return as_pixels(z[:, :3].repeat_interleave(2, dim=-1))

    for images, kept in ((True, {"images", "latents"}), (False, {"latents"})):
        arrays = {name: wait() for name, wait in Fetcher(decode, images, latents=True)(latents).items()}
        assert arrays.keys() == kept and np.array_equal(arrays["latents"], latents.numpy())
    (drawn,) = (wait() for wait in Fetcher(decode)(latents).values())
    assert drawn.dtype == np.uint8 and np.array_equal(drawn, decode(latents).permute(0, 2, 3, 1).numpy())


class OnDevice(torch.Tensor):
    """Values on a GPU, as far as `fetch` can see."""

    is_cuda = True


class Pinned(torch.Tensor):
    """Host memory that a copy reaches only when it was waited for."""

    def copy_(self, values: torch.Tensor, non_blocking: bool = False) -> "Pinned":
        assert non_blocking, "the host waits for the device"
        Event.queue.append(lambda: super(Pinned, self).copy_(values.as_subclass(torch.Tensor)))
        return self


class Event:
    """What was queued before it was recorded is done when it was waited for."""

    queue: ClassVar[list[Callable[[], object]]] = []

    def record(self) -> None:
        self.before = len(self.queue)

    def synchronize(self) -> None:
        for copy in self.queue[: self.before]:
            copy()


def test_outputs_come_off_the_device_while_the_next_batch_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def pinned(shape: torch.Size, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory, "only from there a copy need not be waited for"
        return empty(shape, dtype=dtype).as_subclass(Pinned)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    values = torch.arange(6, dtype=torch.uint8).view(2, 3)
    first, second = (fetch(values.add(k).as_subclass(OnDevice)) for k in (0, 10))
    for wait, shift in ((first, 0), (second, 10)):
        array = wait()
        assert array.dtype == np.uint8 and array.tolist() == (values + shift).tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["npz", "png"])
def test_outputs_keep_every_image_with_its_label(tmp_path: Path, name: str, channels: int) -> None:
    images, labels = _images(9, channels), np.arange(9) % 4
    for index, part in enumerate((slice(0, 5), slice(5, 9))):
        chunk = Chunk(index, Ranges([(998, 1006)])[part])
        _write(tmp_path, name, Drawn(chunk, labels[part], {"images": images[part]}))
    read, classes = read_images(tmp_path)
    assert np.array_equal(read, images) and classes.tolist() == labels.tolist()
    if name == "png":  # as EDM's generator names them
        paths = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
        assert paths[:3] == ["000000/000998.png", "000000/000999.png", "001000/001000.png"] and len(paths) == 9
        with Image.open(tmp_path / paths[2]) as file:
            assert file.info == {"class_label": "2"}  # which earlier versions wrote, and later ones look for
    else:
        with np.load(tmp_path / "images-00001.npz") as shard:
            assert shard["seeds"].tolist() == [1003, 1004, 1005, 1006] and shard["images"].dtype == np.uint8


def test_outputs_latents_are_kept_undecoded(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(np.float32)
    _write(tmp_path, "latents", Drawn(Chunk(0, Ranges([(5, 6)])), None, {"latents": latents}))
    with np.load(tmp_path / "latents-00000.npz") as shard:
        assert np.array_equal(shard["latents"], latents) and shard["labels"].tolist() == [-1, -1]
    with pytest.raises(UserError, match="no images"):
        read_images(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_equal_images_give_equal_files(name: str) -> None:
    arrays = {"images": _images(3), "latents": np.ones((3, 4, 2, 2), np.float32)}
    drawn = Drawn(Chunk(0, Ranges([(0, 2)])), np.arange(3), arrays)
    assert list(FORMATS[name].encode(drawn)) == list(FORMATS[name].encode(drawn))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_adm_is_one_array_of_three_channels(tmp_path: Path, channels: int, labelled: bool) -> None:
    images, labels = _images(7, channels), np.arange(7) if labelled else np.full(7, -1)
    file = io.BytesIO()
    write_adm(file, iter([(images[:4], labels[:4]), (images[4:], labels[4:])]), 7)
    (tmp_path / "samples.npz").write_bytes(file.getvalue())
    with np.load(tmp_path / "samples.npz") as whole:
        assert whole.files == (["arr_0", "arr_1"] if labelled else ["arr_0"])
        assert np.array_equal(whole["arr_0"], np.broadcast_to(images, (7, 8, 8, 3)))
        assert not labelled or whole["arr_1"].tolist() == labels.tolist()
    assert np.array_equal(read_images(tmp_path)[0][..., :channels], images)
    assert read_images(tmp_path)[1].tolist() == labels.tolist()


def test_outputs_adm_may_be_larger_than_a_plain_zip(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 images of 256 x 256 are 9.8 GB; here the limit is 1 kB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    file, images = io.BytesIO(), _images(9, 3)
    write_adm(file, iter([(images, np.full(9, -1))]), 9)
    file.seek(0)
    with np.load(file) as whole:
        assert np.array_equal(whole["arr_0"], images)


def test_outputs_unlabelled_images_say_minus_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    for _ in range(2):
        write_images(folder, _images(2), [5, 6], None)
    assert [path.name for path in folder.iterdir()] == ["images-00000.npz"]
    assert read_images(folder)[1].tolist() == [-1, -1]


def test_outputs_formats_say_what_they_keep() -> None:
    assert [format.keeps for format in FORMATS.values()] == [
        "images-*.npz: all images with their seeds and labels",
        "*/*.png: all images by seed",
        "latents-*.npz: all latents with their seeds and labels",
    ]


def test_outputs_shards_are_read_in_their_order(tmp_path: Path) -> None:
    for index in (100000, 99999):
        chunk = Chunk(index, Ranges([(index, index)]))
        _write(tmp_path, "npz", Drawn(chunk, np.array([index % 7]), {"images": _images(1)}))
    assert read_images(tmp_path)[1].tolist() == [99999 % 7, 100000 % 7]


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


def test_outputs_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        read_images(tmp_path)
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz"):
        read_images(tmp_path)
    (tmp_path / "images-00000.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"images-00000\.npz: not a file of images"):
        read_images(tmp_path)


def test_outputs_of_different_sizes_are_refused(tmp_path: Path) -> None:
    for index, channels in enumerate((1, 3)):
        drawn = Drawn(Chunk(index, Ranges([(index, index)])), None, {"images": _images(1, channels)})
        _write(tmp_path, "npz", drawn)
    with pytest.raises(UserError, match="different sizes or channels"):
        read_images(tmp_path)
