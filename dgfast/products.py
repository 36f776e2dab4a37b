"""What is made of all images of a job, or of its first ones, once they are there."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dgfast.chunks import Chunks
from dgfast.config import GRID_IMAGES
from dgfast.files import replacing, sha256
from dgfast.outputs import PICTURE_CHANNELS, save_grid, write_adm


class Products:
    """The products of one job in its folder.

    Args:
        names: of `config.PRODUCTS`.
        images: reads the images of the chunks, uint8 [n, H, W, C], and their labels [n], one chunk after the other.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], chunks: Chunks,
        images: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
    ) -> None:  # fmt: skip
        self.names, self._folder, self._chunks, self._images = names, folder, chunks, images
        self._beside = ""  # how the grid shows images that are no pictures

    @property
    def shown(self) -> int:
        """How many images the grid shows."""
        return min(GRID_IMAGES, len(self._chunks.seeds)) if "grid" in self.names else 0

    def contents(self) -> list[str]:
        """What the files hold, for the user."""
        texts = {
            "adm": "samples_*.npz: all images as arr_0, three channels each",
            "grid": f"grid.png: the first {self.shown}{self._beside}",
        }
        return [texts[name] for name in self.names]

    def made(self) -> dict[str, str]:
        """Make them: the name of each file, and its SHA-256."""
        paths = [self._adm() if name == "adm" else self._grid() for name in self.names]
        return {path.name: sha256(path) for path in paths}

    def are(self, noted: Mapping[str, str] | None) -> bool:
        """Whether the files are what `made` returned; None: it was never called."""
        paths = {self._folder / name: digest for name, digest in (noted or {}).items()}
        return noted is not None and all(path.is_file() and sha256(path) == digest for path, digest in paths.items())

    def _grid(self) -> Path:
        shown = [images for images, _ in islice(self._images(), math.ceil(GRID_IMAGES / self._chunks.size))]
        path = self._folder / "grid.png"
        save_grid(np.concatenate(shown)[:GRID_IMAGES], path)
        channels = shown[0].shape[-1]
        self._beside = "" if channels in PICTURE_CHANNELS else f", their {channels} channels side by side"
        return path

    def _adm(self) -> Path:
        count = len(self._chunks.seeds)
        _, height, width, _ = next(self._images())[0].shape
        path = self._folder / f"samples_{count}x{height}x{width}x3.npz"
        with replacing(path) as file:
            write_adm(file, self._images(), count)
        return path
