"""Images as files: the formats of `python -m dgfast.sample`, each as bytes of one chunk, and the way back.

Where the files lie, what is there already and who writes is the business of `job_folder`.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from dgfast.chunks import Chunk
from dgfast.errors import UserError
from dgfast.files import replacing
from dgfast.ranges import Ranges


# From the sampler to the host -----------------------------------------------------------------------------------------
def to_uint8(images: Tensor) -> np.ndarray:
    """Float images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]; values outside are clipped (as EDM does)."""
    return fetch(as_pixels(images).permute(0, 2, 3, 1))()


def fetch(values: Tensor) -> Callable[[], np.ndarray]:
    """The copy off the device starts now, and the returned function waits for it.

    So the next batch can be queued on the device before this one is on the disk.
    """
    if not values.is_cuda:
        return values.numpy
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def as_pixels(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 of the same shape; values outside are clipped (as EDM does)."""
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Fetcher:
    """Starts the way of what a sampler drew, [N, C, H, W], to the arrays that the formats of a job keep.

    Attributes:
        decode: makes pixels, uint8 [N, 3, H, W], of latents; None where the sampler draws images.
        images, latents: whether any format keeps decoded images, and the latents as they were drawn.
    """

    decode: Callable[[Tensor], Tensor] | None = None
    images: bool = True
    latents: bool = False

    def __call__(self, drawn: Tensor) -> dict[str, Callable[[], np.ndarray]]:
        """A function for each of "images", uint8 [N, H, W, C], and "latents", float32 [N, C, H, W], if kept."""
        waits = {}
        if self.images:
            pixels = as_pixels(drawn) if self.decode is None else self.decode(drawn)
            waits["images"] = fetch(pixels.permute(0, 2, 3, 1))
        if self.latents:
            waits["latents"] = fetch(drawn.float())
        return waits


# Formats --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Drawn:
    """A chunk with what was drawn for it.

    Attributes:
        labels: class indices int64 [N]; None without classes.
        arrays: "images" uint8 [N, H, W, C] and "latents" float32 [N, C, H, W], as far as the job keeps them.
    """

    chunk: Chunk
    labels: np.ndarray | None
    arrays: dict[str, np.ndarray]


class Format(Protocol):
    """A way to keep the images of a chunk.

    Attributes:
        array: which array of `Drawn` it keeps. keeps: what of each image, for the user.
    """

    @property
    def array(self) -> str: ...

    @property
    def keeps(self) -> str: ...

    def paths(self, chunk: Chunk) -> list[str]:
        """The chunk's files, as seen from the job's folder."""
        ...

    def encode(self, drawn: Drawn) -> Iterator[bytes]:
        """What each of them holds. Equal arrays give equal bytes."""
        ...


@dataclass(frozen=True)
class Shards:
    """One npz a chunk: images-00000.npz, ... with `images` (or `latents`), `seeds` and `labels`, -1 for none."""

    array: str

    @property
    def keeps(self) -> str:
        return f"{self.array}-*.npz: all {self.array} with their seeds and labels"

    def paths(self, chunk: Chunk) -> list[str]:
        return [f"{self.array}-{chunk.index:05d}.npz"]

    def encode(self, drawn: Drawn) -> Iterator[bytes]:
        seeds = np.asarray(list(drawn.chunk.seeds), dtype=np.int64)
        labels = np.full(len(seeds), -1) if drawn.labels is None else drawn.labels
        file = io.BytesIO()
        arrays: dict[str, Any] = {
            self.array: drawn.arrays[self.array],
            "seeds": seeds,
            "labels": labels.astype(np.int64),
        }
        np.savez_compressed(file, **arrays)
        yield file.getvalue()


@dataclass(frozen=True)
class PngTree:
    """One PNG an image, by its seed: 000000/000123.png, as EDM's generator names them; its label is a text in it."""

    array: str = "images"
    keeps: str = "*/*.png: all images by seed"

    def paths(self, chunk: Chunk) -> list[str]:
        return [f"{seed - seed % 1000:06d}/{seed:06d}.png" for seed in chunk.seeds]

    def encode(self, drawn: Drawn) -> Iterator[bytes]:
        for k, pixels in enumerate(drawn.arrays["images"]):
            texts = PngImagePlugin.PngInfo()
            if drawn.labels is not None:
                texts.add_text(LABEL, str(int(drawn.labels[k])))
            yield _png(pixels, texts)


LABEL = "class_label"
"""Name of the text in a PNG that says the image's class index."""
FORMATS: dict[str, Format] = {"npz": Shards("images"), "png": PngTree(), "latents": Shards("latents")}
"""How a job's images are kept, chunk by chunk."""


PICTURE_CHANNELS = (1, 3)
"""Of images that can be looked at: grey, and colour."""


def _png(pixels: np.ndarray, texts: PngImagePlugin.PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, format="png", pnginfo=texts)
    return file.getvalue()


def require_pictures(formats: Sequence[str], channels: int) -> None:
    """
    Raises:
        UserError: a format of pictures, for images of other channels than grey and colour have.
    """
    pictures = [name for name in formats if name in ("png", "adm")]
    if pictures and channels not in PICTURE_CHANNELS:
        raise UserError(
            f"--format {pictures[0]} keeps grey and colour images, and these have {channels} channels; use npz"
        )


def grid_png(images: np.ndarray) -> bytes:
    """One PNG of uint8 images [N, H, W, C], row by row, as near to a square as can be.

    Of images that are neither grey nor colour, the channels stand side by side, each in grey.
    """
    if images.shape[-1] not in PICTURE_CHANNELS:
        images = images.transpose(0, 1, 3, 2).reshape(*images.shape[:2], -1, 1)
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return _png(sheet.reshape(rows * height, columns * width, channels))


def save_grid(images: np.ndarray, path: Path) -> None:
    """Write `grid_png` of the images in one move."""
    with replacing(path) as file:
        file.write(grid_png(images))


def write_adm(file: IO[bytes], parts: Iterator[tuple[np.ndarray, np.ndarray]], count: int) -> None:
    """The npz that OpenAI's evaluator reads: arr_0 uint8 [N, H, W, 3], grey as three channels, and arr_1, the labels.

    Args:
        parts: images uint8 [n, H, W, C] and labels [n], part by part; no more than one is held.
        count: N. arr_1 is left out of images without labels.
    """
    labels = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        stamp = zipfile.ZipInfo("arr_0.npy")  # of a fixed date, so that equal images give equal files
        with archive.open(stamp, "w", force_zip64=True) as member:
            for k, (images, classes) in enumerate(parts):
                coloured = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
                if k == 0:
                    shape = (count, *coloured.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(coloured).tobytes())
                labels.append(classes)
        if labels and (classes := np.concatenate(labels)).min() >= 0:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, classes, allow_pickle=False)


def write_images(folder: Path, images: np.ndarray, seeds: Iterable[int], labels: np.ndarray | None) -> None:
    """Write images uint8 [N, H, W, C] as one shard into a folder, made if need be, that `read_images` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn(Chunk(0, Ranges.of(seeds)), labels, {"images": images})
    for name, content in zip(FORMATS["npz"].paths(drawn.chunk), FORMATS["npz"].encode(drawn), strict=True):
        with replacing(folder / name) as file:
            file.write(content)
