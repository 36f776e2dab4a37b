"""Sets of images, read a few at a time: folders of `dgfast sample`, of pictures, npz files, arrays.

A set knows its shape, its number and its seeds before the first image is read. Seeds are those of shards, and the names
of pictures that are nothing but digits, as EDM's and dgfast's are (000000/000123.png).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgfast.errors import UserError
from dgfast.evaluation import npz
from dgfast.evaluation.intact import require_intact
from dgfast.image_folder import image_files, read_files
from dgfast.manifest import content_of
from dgfast.training.data import ImageSet

_MOST_BYTES = 32 * 2**20
"""Of the images that are read at once."""
_MOST_IMAGES = 250

Part = tuple[np.ndarray, np.ndarray]
"""Images uint8 [n, H, W, C] and labels int64 [n], -1 for none."""


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        name: for messages and tables. shape: height, width, channels. count: of images.
        seeds: int64 [count], in the order in which the images are read; None where nothing tells them.
        folder: where they lie; None of arrays. settings: of the job that drew them, as its manifest has them.
    """

    name: str
    shape: tuple[int, int, int]
    count: int
    read: Callable[[int], Iterator[Part]] = field(repr=False)
    seeds: np.ndarray | None = None
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def parts(self) -> Iterator[Part]:
        """All of them in order, a few at a time.

        Raises:
            UserError: a broken file, or images of another shape among them.
        """
        height, width, channels = self.shape
        most = max(1, min(_MOST_IMAGES, _MOST_BYTES // (height * width * channels)))
        for images, labels in self.read(most):
            if images.dtype != np.uint8 or images.shape[1:] != self.shape:
                raise UserError(
                    f"{self.name}: images of different sizes or channels: height, width and channels of the first one "
                    f"are {self.shape}, of another {images.shape[1:]} ({images.dtype})"
                )
            yield images, labels


def of_arrays(name: str, images: ImageSet) -> Images:
    """A set that lies in memory."""

    def read(most: int) -> Iterator[Part]:
        for start in range(0, len(images), most):
            yield images.images[start : start + most], images.labels[start : start + most]

    height, width, channels = images.images.shape[1:]
    return Images(name, (height, width, channels), len(images), read)


def open_images(path: Path) -> Images:
    """A folder of `dgfast sample` or of pictures, or an npz file.

    What the folder's manifest promises is looked at: how many images there are, and the checksums of their files.

    Raises:
        UserError: no images there, files of something else, others than the manifest promises, or damaged ones.
    """
    if path.is_file():
        return _of_npz(str(path), None, [path], {})
    if not path.is_dir():
        raise UserError(f"{path}: no folder of images, and no npz file of them, is there")
    content = content_of(path) or {}
    require_intact(path, content)
    names = image_files(path)
    settings = content.get("job")
    settings = settings if isinstance(settings, dict) else {}
    files = [path / name for name in names]
    shards = names[0].endswith(".npz")
    images = _of_npz(str(path), path, files, settings) if shards else _of_pictures(path, names, settings)
    promised = content.get("images")
    if isinstance(promised, int) and promised != len(images):
        remedy = "the command that drew them draws the rest"
        if len(images) > promised:
            remedy = "others are among them; move those elsewhere"
        raise UserError(f"{path} holds {len(images)} images, its manifest promises {promised}: {remedy}")
    return images


# Npz files ------------------------------------------------------------------------------------------------------------
def _of_npz(name: str, folder: Path | None, files: Sequence[Path], settings: Mapping[str, Any]) -> Images:
    headers = [(file, *_images_of(file)) for file in files]
    shape, counts = headers[0][2][1:], [shape[0] for _, _, shape in headers]
    for file, _, other in headers:
        if other[1:] != shape:
            raise UserError(
                f"{name}: images of different sizes or channels: {shape} is the first file's height, width and "
                f"channels, {other[1:]} are those of {file.name}"
            )
    seeds = [npz.whole(file, "seeds").astype(np.int64) for file, key, _ in headers if _has_seeds(file, key)]
    known = len(seeds) == len(files) and [len(part) for part in seeds] == counts

    def read(most: int) -> Iterator[Part]:
        for file, key, (count, *_) in headers:
            labels, start = _labels_of(file, key, count), 0
            for images in npz.rows(file, key, most):
                yield images.reshape(len(images), *shape), labels[start : start + len(images)]
                start += len(images)

    return Images(name, shape, sum(counts), read, np.concatenate(seeds) if known else None, folder, settings)


def _images_of(file: Path) -> tuple[str, tuple[int, int, int, int]]:
    """The name and the shape [N, H, W, C] of a file's images.

    Raises:
        UserError: it holds none.
    """
    headers = npz.headers(file)
    key = next((key for key in ("images", "arr_0") if key in headers), None)
    if key is None:
        latents = ": latents are judged once they are decoded" if "latents" in headers else ""
        raise UserError(
            f"{file}: no images, which are named `images` or `arr_0`; it holds {', '.join(headers)}{latents}"
        )
    header = headers[key]
    shape = (*header.shape, 1) if len(header.shape) == 3 else header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or 0 in shape:
        raise UserError(f"{file}: images must be uint8 [N, H, W, C]; found {header.dtype} {list(header.shape)}")
    return key, shape


def _has_seeds(file: Path, key: str) -> bool:
    header = npz.headers(file).get("seeds") if key == "images" else None
    return header is not None and len(header.shape) == 1 and np.issubdtype(header.dtype, np.integer)


def _labels_of(file: Path, key: str, count: int) -> np.ndarray:
    name = "labels" if key == "images" else "arr_1"
    header = npz.headers(file).get(name)
    if header is None:
        return np.full(count, -1)
    if header.shape != (count,) or not np.issubdtype(header.dtype, np.integer):
        raise UserError(f"{file}: {name} must be {count} whole numbers; found {header.dtype} {list(header.shape)}")
    return npz.whole(file, name).astype(np.int64)


# Pictures -------------------------------------------------------------------------------------------------------------
def _of_pictures(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Images:
    first, _ = read_files(folder, names[:1])
    stems = [Path(name).stem for name in names]
    numbered = all(stem.isdecimal() and len(stem) < 19 for stem in stems) and len({*stems}) == len(stems)

    def read(most: int) -> Iterator[Part]:
        for start in range(0, len(names), most):
            yield read_files(folder, names[start : start + most])

    seeds = np.array([int(stem) for stem in stems], dtype=np.int64) if numbered else None
    return Images(str(folder), first.shape[1:], len(names), read, seeds, folder, settings)
