"""The images of a folder that `python -m dgfast.sample` wrote, in whichever of its formats."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dgfast.errors import UserError
from dgfast.manifest import promised_images
from dgfast.outputs import LABEL

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""How the names of pictures end."""


def read_files(folder: Path, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels int64 [N] of one npz, or of PNGs, in a folder.

    Raises:
        UserError: unreadable, or files of something else.
    """
    images, labels = [], []
    for name in paths:
        try:
            if name.endswith(".npz"):
                with (folder / name).open("rb") as file, np.load(file, allow_pickle=False) as shard:
                    part = shard["images" if "images" in shard.files else "arr_0"]
                    classes = shard["labels" if "images" in shard.files else "arr_1"] if len(shard.files) > 1 else None
                    images.append(part)
                    labels.append(np.full(len(part), -1) if classes is None else classes)
            else:
                with Image.open(folder / name) as picture:
                    pixels = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)  # no indices
                    labels.append(np.array([int(picture.info.get(LABEL, -1))]))
                images.append((pixels[..., None] if pixels.ndim == 2 else pixels)[None])
        except (KeyError, OSError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            raise UserError(f"{folder / name}: not a file of images ({error})") from error
    shapes = [part.shape[1:] for part in images]
    odd = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise UserError(
            f"{folder}: images of different sizes or channels: {paths[odd]} has {list(shapes[odd])}, "
            f"{paths[0]} {list(shapes[0])}"
        )
    return np.concatenate(images), np.concatenate(labels)


def image_files(folder: Path) -> list[str]:
    """The files that hold a folder's images, in their order: shards, npz of ADM's, or pictures, whose grid is none.

    Raises:
        UserError: no images there.
    """
    paths = [path.name for path in folder.glob("images-*.npz")]
    paths = paths or [path.name for path in folder.glob("*.npz") if not path.name.startswith("latents-")]
    paths = paths or [str(path.relative_to(folder)) for path in folder.glob("[0-9]*/[0-9]*.png")]
    pictures = (path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix.lower() in PICTURES)
    paths = paths or [str(path.relative_to(folder)) for path in pictures if path.stem != "grid"]
    if not paths:
        raise UserError(f"{folder}: no images; draw some with `dgfast sample --out {folder}`")
    return sorted(paths, key=lambda name: (len(name), name))


def read_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, H, W, C] and labels int64 [N], -1 for none, of a folder of `python -m dgfast.sample`.

    Raises:
        UserError: no images there, files of something else, or fewer images than the folder's manifest promises.
    """
    images, labels = read_files(folder, image_files(folder))
    promised = promised_images(folder)
    if promised is not None and promised != len(images):
        remedy = "the command that drew them draws the rest"
        if len(images) > promised:
            remedy = "others are among them; move those elsewhere"
        raise UserError(f"{folder} holds {len(images)} images, its manifest promises {promised}: {remedy}")
    return images, labels
