"""What is known of an image, from an npz of strangers: nothing in it is executed, and its sizes are judged first."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dgfast import bounds
from dgfast.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_KINDS = {"image": "uint8, float16, float32, float64", "mask": "bool, uint8, int64, float16, float32, float64"}
_LARGEST = 100.0  # several times what latents reach


def read(path: str | Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The image and the mask [C, H, W], float64: about [-1, 1], and 1 for what is known, else 0.

    The file has two arrays, as `numpy.savez` writes them. `image` [H, W, C] or [H, W]: uint8 from 0 to 255, or floating
    numbers in the network's own units. `mask` of the same size or [H, W]: true or 1 for what is known, false or 0.

    Args:
        shape: of the network's images, [C, H, W].

    Raises:
        UserError: no such file, or one of something else.
    """
    import numpy as np

    path = Path(path)
    c, h, w = shape
    with bounds.open_file(path) as file:
        if path.stat().st_size > bounds.OBSERVATION_BYTES:
            raise UserError(f"{path} has more than {bounds.OBSERVATION_BYTES:,} bytes: it is no single image")
        try:
            with zipfile.ZipFile(file) as archive:
                image, mask = (_array(archive, name, ((h, w, c), (h, w))) for name in _KINDS)
        except Exception as error:  # zip, deflate and npy have errors of their own, of a dozen classes
            raise UserError(f"{path}: no npz of an image and a mask ({one_line(error)})") from error
    if not np.isin(mask, (0, 1)).all() or not mask.any():
        raise UserError(f"{path}: the mask must have 1 for what is known and 0 for what is not, and know something")
    known = np.broadcast_to(mask.astype(np.float64).reshape(h, w, -1), (h, w, c))
    pixels = image.astype(np.float64).reshape(h, w, -1)
    pixels = np.broadcast_to(pixels / 127.5 - 1 if image.dtype == np.uint8 else pixels, (h, w, c))
    if not np.isfinite(pixels[known > 0]).all():
        raise UserError(f"{path}: the image has values that are no finite numbers where the mask says that it is known")
    largest = float(np.abs(pixels[known > 0]).max())
    if largest > _LARGEST:
        raise UserError(
            f"{path}: the image reaches {largest:g}; floating numbers are in the network's units, about [-1, 1]: "
            "give pixels from 0 to 255 as uint8"
        )
    return _planes(np.where(known > 0, pixels, 0)), _planes(known)


def _planes(image: np.ndarray) -> Tensor:
    """[H, W, C] as [C, H, W]."""
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _array(archive: zipfile.ZipFile, name: str, shapes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The array of that name, once its type and shape are found to be among those wanted.

    Raises:
        KeyError: there is none. ValueError: it is another array, or no array. Errors of zip and deflate besides.
    """
    from numpy.lib import format as npy

    if archive.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not use")
    with archive.open(f"{name}.npy") as member:
        found, kind = _header(member)
    if str(kind) not in _KINDS[name].split(", "):
        raise ValueError(f"{name} is of {kind}; give one of {_KINDS[name]}")
    if found not in shapes:
        raise ValueError(
            f"{name} has the shape {list(found)}; give {' or '.join(str(list(shape)) for shape in shapes)}"
        )
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array; of version 1.0, whose header has 64 kB at most, and which numpy writes."""
    from numpy.lib import format as npy

    version = npy.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"an array in version {version} of its format; numpy.savez writes 1.0")
    shape, _, kind = npy.read_array_header_1_0(member)
    return shape, kind
