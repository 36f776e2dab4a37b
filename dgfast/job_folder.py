"""The folder of a sampling job: one job, one owner, and nothing that was made is lost.

A chunk is there once all its files are, each moved into its place as a whole, and its checksum is noted. So a job that
was killed at any moment goes on with what is missing, and files that were damaged since are drawn anew.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock, Timeout

from dgfast import manifest as manifests
from dgfast.config import GRID_IMAGES
from dgfast.errors import StorageError, UserError
from dgfast.files import replacing, sha256
from dgfast.image_folder import read_files
from dgfast.manifest import Manifest
from dgfast.outputs import FORMATS, PICTURE_CHANNELS, Chunk, Drawn, Format, grid_png, write_adm
from dgfast.ranges import Ranges

_LOCK = ".lock"
_PARTIAL = ("*.partial", "*/*.partial")
_BEFORE_THE_MANIFEST = (_LOCK, f"{manifests.NAME}.partial")
_IMAGES = ("images-*.npz", "latents-*.npz", "samples_*.npz", "[0-9]*/[0-9]*.png", "grid.png")


class Chunks(Sequence[Chunk]):
    """The images of a job in chunks of one size, the last one smaller.

    Args:
        labels: class indices, repeated over the seeds; None leaves them to the seeds.
    """

    def __init__(self, seeds: Ranges, labels: Ranges | None, size: int) -> None:
        self.seeds, self.labels, self.size = seeds, labels, size

    def __len__(self) -> int:
        return math.ceil(len(self.seeds) / self.size)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = index * self.size
        seeds = self.seeds[start : start + self.size]
        if self.labels is None:
            return Chunk(index, seeds)
        return Chunk(index, seeds, [self.labels[k % len(self.labels)] for k in range(start, start + len(seeds))])

    def images(self, indices: Ranges) -> int:
        """How many images these chunks have."""
        short = len(self) * self.size - len(self.seeds)
        return len(indices) * self.size - (short if indices.largest == len(self) - 1 else 0)


class JobFolder:
    """One job in one folder.

    Attributes:
        path: the folder. chunks: all of the job. missing: the indices of those that are to be drawn.
        damaged: how many of these were there, and are not what they were. manifest: see `Manifest`.
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        chunks: Chunks,
        formats: Sequence[str],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """
        Args:
            formats: names of `config.KEPT` and `config.PRODUCTS`.
            rank: of this process; the one of rank 0 opens the folder, others only add to it. processes: all of them.
        """
        self.path, self.chunks, self._rank, self._processes = path, chunks, rank, processes
        self.manifest = Manifest(path, {**job, "formats": sorted(formats)}, len(chunks.seeds))
        kept = [FORMATS[name] for name in formats if name in FORMATS]
        self._passing = not kept  # products alone are made of shards, which go once they are there
        self._kept: list[Format] = kept or [FORMATS["npz"]]
        self._products = {name: self._adm if name == "adm" else self._grid for name in formats if name not in FORMATS}
        self.missing, self.damaged = Ranges(), 0
        self._beside = ""  # how the grid shows images that are no pictures

    @property
    def arrays(self) -> set[str]:
        """Which arrays of `Drawn` the job keeps."""
        return {form.array for form in self._kept}

    @property
    def files_of_a_chunk(self) -> int:
        """How many files a whole chunk has."""
        return len(self._files(0))

    @property
    def shown(self) -> int:
        """How many images its grid shows."""
        return min(GRID_IMAGES, len(self.chunks.seeds)) if "grid" in self._products else 0

    @property
    def copies(self) -> list[str]:
        """The array of each of the job's copies of its images; "adm" of the one in three channels."""
        return [form.array for form in self._kept] + [name for name in self._products if name == "adm"]

    # By the process of rank 0 -------------------------------------------------------------------------------------
    @contextmanager
    def opened(self, run: Mapping[str, Any], overwrite: bool = False) -> Iterator[None]:
        """Hold the folder's lock, find out what is missing, and keep the manifest from before the first image on.

        Args:
            run: what the manifest tells of this run: command, versions, device.
            overwrite: remove an earlier job of dgfast there, and nothing else.

        Raises:
            UserError: another job's folder, or somebody else's; a process that draws into it now.
            StorageError: it can't be written.
        """
        with storage(self.path):
            _refuse_foreign(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._locked()
        began = False
        try:
            with storage(self.path):
                if overwrite:
                    self._remove_all()
                for partial in [path for pattern in _PARTIAL for path in self.path.glob(pattern)]:
                    partial.unlink()
                self._read()
                began = True
                self.manifest.begin(run)
            yield
        finally:
            with suppress(OSError):
                if began:
                    self._leave()
            lock.release()
            with suppress(OSError):
                if not self.manifest.path.exists():
                    (self.path / _LOCK).unlink(missing_ok=True)
                    self.path.rmdir()

    def _leave(self) -> None:
        """Save the manifest; or remove that of a first run that drew nothing, as if there had been none.

        Another process may still be writing its last chunk, which would be somebody else's without the manifest.
        """
        self.manifest.take_up()
        if self._processes > 1 or self.manifest.chunks or len(self.manifest.runs) > 1 or self.manifest.products:
            self.manifest.save()
        else:
            self.manifest.path.unlink()

    def _locked(self) -> FileLock:
        lock = FileLock(self.path / _LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            who = manifests.owner(self.path)
            raise UserError(
                f"--out {self.path}: {who} is drawing into it; wait for it, or name another folder"
            ) from None
        except NotImplementedError as error:
            raise StorageError(f"--out {self.path}: this file system has no locks; name a folder elsewhere") from error
        return lock

    def look(self, overwrite: bool = False) -> None:
        """Find out what is missing, without a change to the folder.

        Args:
            overwrite: all of it, whatever is there.

        Raises:
            UserError: another job's folder, or somebody else's. StorageError: it can't be read.
        """
        with storage(self.path):
            _refuse_foreign(self.path)
            if overwrite:
                self.missing = Ranges(_gaps([], len(self.chunks)))
            else:
                self._read()

    def _read(self) -> None:
        self.manifest.read()
        noted = self.manifest.chunks
        if self._passing and self._done():
            return
        whole = sorted(index for index, digest in noted.items() if self._digest(index) == digest)
        self.damaged = len(noted) - len(whole)
        self.missing = Ranges(_gaps(whole, len(self.chunks)))
        self.manifest.chunks = {index: noted[index] for index in whole}
        if self.missing or not self._done():
            self.manifest.products = None

    def _digest(self, index: int) -> str | None:
        """SHA-256 over the files of a chunk; None where one is missing."""
        if index >= len(self.chunks):
            return None
        digest = hashlib.sha256()
        try:
            for name in self._files(index):
                digest.update((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    def _files(self, index: int) -> list[str]:
        return [name for form in self._kept for name in form.paths(self.chunks[index])]

    # While drawing, by every process ------------------------------------------------------------------------------
    def add(self, drawn: Drawn) -> None:
        """Write the files of a chunk, each in one move, and note it.

        Raises:
            StorageError: they can't be written; nothing of a file stays.
        """
        digest = hashlib.sha256()
        with storage(self.path):
            for form in self._kept:
                for name, content in zip(form.paths(drawn.chunk), form.encode(drawn), strict=True):
                    path = self.path / name
                    if path.parent != self.path:
                        path.parent.mkdir(exist_ok=True)
                    with replacing(path) as file:
                        file.write(content)
                    digest.update(content)
            self.manifest.note(drawn.chunk.index, digest.hexdigest(), self._rank)
            if self._rank == 0:
                self.manifest.save_now_and_then()

    # In the end, by the process of rank 0 -------------------------------------------------------------------------
    def there(self) -> Ranges:
        """The indices of the chunks that are there."""
        with storage(self.path):
            self.manifest.take_up()
        return Ranges.of(sorted(self.manifest.chunks))

    def contents(self) -> list[str]:
        """What the finished folder holds, for the user."""
        made = {
            "adm": "samples_*.npz: all images as arr_0, three channels each",
            "grid": f"grid.png: the first {self.shown}{self._beside}",
        }
        kept = [] if self._passing else [form.keeps for form in self._kept]
        return [*kept, *(made[name] for name in self._products)]

    def finish(self) -> None:
        """Make the products of the whole job, where they are not there.

        Raises:
            StorageError: they can't be written.
        """
        with storage(self.path):
            self.manifest.take_up()
            if self.manifest.products is None:
                self.manifest.products = {
                    path.name: sha256(path) for path in (make() for make in self._products.values())
                }
            if self._passing:
                self.manifest.chunks = {}
            self.manifest.save()
            self.manifest.remove_journals()
            if self._passing:
                for path in self.path.glob("images-*.npz"):
                    path.unlink()

    def _done(self) -> bool:
        """Whether the job was finished before, and what was made then is what it was."""
        products = self.manifest.products
        return products is not None and all(
            (self.path / name).is_file() and sha256(self.path / name) == digest for name, digest in products.items()
        )

    def _images(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        form = next(form for form in self._kept if form.array == "images")
        for index in range(len(self.chunks)):
            yield read_files(self.path, form.paths(self.chunks[index]))

    def _grid(self) -> Path:
        shown = list(islice(self._images(), math.ceil(GRID_IMAGES / self.chunks.size)))
        path = self.path / "grid.png"
        with replacing(path) as file:
            file.write(grid_png(np.concatenate([images for images, _ in shown])[:GRID_IMAGES]))
        channels = shown[0][0].shape[-1]
        self._beside = "" if channels in PICTURE_CHANNELS else f", their {channels} channels side by side"
        return path

    def _adm(self) -> Path:
        count = len(self.chunks.seeds)
        _, height, width, _ = next(self._images())[0].shape
        path = self.path / f"samples_{count}x{height}x{width}x3.npz"
        with replacing(path) as file:
            write_adm(file, self._images(), count)
        return path

    def _remove_all(self) -> None:
        """The files of an earlier job, the manifest last."""
        if self.manifest.path.exists():
            for path in [path for pattern in _IMAGES for path in self.path.glob(pattern)]:
                path.unlink()
                if path.parent != self.path and not any(path.parent.iterdir()):
                    path.parent.rmdir()
            self.manifest.remove_journals()
            self.manifest.path.unlink()


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Makes a `StorageError`, which names the folder, of what the operating system raises."""
    try:
        yield
    except OSError as error:
        gone = "; the folder is gone" if isinstance(error, FileNotFoundError) and not folder.is_dir() else ""
        raise StorageError(f"--out {folder}: can't be written ({error.strerror or error}{gone})") from error


def _refuse_foreign(path: Path) -> None:
    """Raises UserError if the folder holds anything but what a job leaves that was killed before its first manifest."""
    if path.exists() and not (path / manifests.NAME).exists():
        foreign = next((entry.name for entry in path.iterdir() if entry.name not in _BEFORE_THE_MANIFEST), None)
        if foreign is not None:
            raise UserError(f"--out {path} already holds {foreign}; name a new folder, nothing was changed")


def _gaps(present: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """First and last of each run of numbers below `count` that are not among the sorted `present`."""
    begin = 0
    for index in [*present, count]:
        if index > begin:
            yield begin, index - 1
        begin = index + 1
