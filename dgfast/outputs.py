"""Images on disk: npz shards written one by one, a PNG grid, a manifest. Nothing waits in memory for the end."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgfast.errors import UserError

GRID_IMAGES = 400
"""The PNG grid shows at most so many images, the first ones; the shards hold all."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Float images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]; values outside are clipped (as EDM does)."""
    return fetch_uint8(images)()


def fetch_uint8(images: Tensor) -> Callable[[], np.ndarray]:
    """As `to_uint8`, in two halves: the copy off the device starts now, and the returned function waits for it.

    So the next batch can be queued on the device before this one is on the disk.
    """
    pixels = (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if not pixels.is_cuda:
        return pixels.numpy
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


class Writer:
    """Writes the images of one job into a new folder, batch by batch.

    Args:
        folder: made if need be; must not hold anything.
        formats: any of "png" (one grid, grid.png) and "npz" (shards images-00000.npz, ... with the keys `images`
            uint8 [N, H, W, C], `seeds` and `labels` int64 [N]; label -1 means none).

    Raises:
        UserError: the folder is in use or can't be written.
    """

    def __init__(self, folder: Path, formats: Sequence[str]) -> None:
        self.folder, self._formats = folder, formats
        self._shards = 0
        self._shown: list[np.ndarray] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = next(folder.iterdir(), None)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out {folder}: can't be written ({error.strerror})") from error
        if used is not None:
            raise UserError(f"--out {folder} already holds {used.name}; name a new folder, nothing was changed")

    def add(self, images: np.ndarray, seeds: Sequence[int], labels: np.ndarray | None) -> None:
        """Write one batch: uint8 [N, H, W, C], its seeds and its labels."""
        if "npz" in self._formats:
            known = np.full(len(images), -1) if labels is None else np.asarray(labels)
            path = self.folder / f"images-{self._shards:05d}.npz"
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez_compressed(
                    file, images=images, seeds=np.asarray(seeds, dtype=np.int64), labels=known.astype(np.int64)
                )
            os.replace(partial, path)
            self._shards += 1
        room = GRID_IMAGES - sum(len(batch) for batch in self._shown)
        if "png" in self._formats and room > 0:
            self._shown.append(images[:room])

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the grid and `manifest.json`."""
        if self._shown:
            save_grid(np.concatenate(self._shown), self.folder / "grid.png")
        path = self.folder / "manifest.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_strict(manifest), indent=1) + "\n")
        os.replace(partial, path)


def _strict(value: Any) -> Any:
    """`value` with infinities as text, for which JSON has no number."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save_grid(images: np.ndarray, path: Path) -> None:
    """One PNG of uint8 images [N, H, W, C], row by row, as near to a square as can be."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    partial = path.with_suffix(".partial")
    Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(partial, format="png")
    os.replace(partial, path)


def read_shards(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, H, W, C] and labels int64 [N] of a folder that `Writer` wrote.

    Raises:
        UserError: no shards there, or shards of something else.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise UserError(f"{folder}: no npz files; draw some with `dgfast sample --format npz --out {folder}`")
    images, labels = [], []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as shard:
                images.append(shard["images"])
                labels.append(shard["labels"])
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a shard with images and labels ({error})") from error
    return np.concatenate(images), np.concatenate(labels)
