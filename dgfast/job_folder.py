"""The folder of a sampling job: one job, one owner, and nothing that was made is lost.

A chunk is there once all its files are, each moved into its place as a whole, and its checksum is noted. So a job that
was killed at any moment goes on with what is missing, and files that were damaged since are drawn anew.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dgfast import manifest as manifests
from dgfast.chunks import Chunks
from dgfast.errors import StorageError, UserError
from dgfast.files import replacing
from dgfast.image_folder import read_files
from dgfast.manifest import Manifest
from dgfast.outputs import FORMATS, Drawn, Format
from dgfast.products import Products
from dgfast.ranges import Ranges

_LOCK = ".lock"
_PARTIAL = ("*.partial", "*/*.partial")
_BEFORE_THE_MANIFEST = (_LOCK, f"{manifests.NAME}.partial")
_IMAGES = ("images-*.npz", "latents-*.npz", "samples_*.npz", "[0-9]*/[0-9]*.png", "grid.png")


class JobFolder:
    """One job in one folder.

    Attributes:
        path: the folder. chunks: all of the job. missing: the indices of those that are to be drawn.
        damaged: how many of these were there, and are not what they were.
        manifest: see `Manifest`. products: what is made of the images in the end, see `Products`.
    """

    def __init__(
        self,
        path: Path,
        job: Mapping[str, Any],
        chunks: Chunks,
        formats: Sequence[str],
        rank: int = 0,
        processes: int = 1,
        typed: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            formats: names of `config.KEPT` and `config.PRODUCTS`.
            rank: of this process; the one of rank 0 opens the folder, others only add to it. processes: all of them.
            typed: see `Manifest`.
        """
        self.path, self.chunks, self._rank, self._processes = path, chunks, rank, processes
        self.manifest = Manifest(path, {**job, "formats": sorted(formats)}, len(chunks.seeds), typed)
        kept = [FORMATS[name] for name in formats if name in FORMATS]
        self._passing = not kept  # products alone are made of shards, which go once they are there
        self._kept: list[Format] = kept or [FORMATS["npz"]]
        self.products = Products(path, [name for name in formats if name not in FORMATS], chunks, self._images)
        self.missing, self.damaged = Ranges(), 0

    @property
    def arrays(self) -> set[str]:
        """Which arrays of `Drawn` the job keeps."""
        return {form.array for form in self._kept}

    @property
    def files_of_a_chunk(self) -> int:
        """How many files a whole chunk has."""
        return len(self._files(0))

    @property
    def copies(self) -> list[str]:
        """The array of each of the job's copies of its images; "adm" of the one in three channels."""
        return [form.array for form in self._kept] + [name for name in self.products.names if name == "adm"]

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
        if self._passing and self.products.are(self.manifest.products):
            self.manifest.chunks = {}  # those of the journals, in a run that was killed while it removed its shards
            return
        whole = sorted(index for index, digest in noted.items() if self._digest(index) == digest)
        self.damaged = len(noted) - len(whole)
        self.missing = Ranges(_gaps(whole, len(self.chunks)))
        self.manifest.chunks = {index: noted[index] for index in whole}
        if self.missing or not self.products.are(self.manifest.products):
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
        if self._passing and self.manifest.products is not None:  # their shards may have gone
            return Ranges([(0, len(self.chunks) - 1)])
        with storage(self.path):
            self.manifest.take_up()
        return Ranges.of(sorted(self.manifest.chunks))

    def contents(self) -> list[str]:
        """What the finished folder holds, for the user."""
        kept = [] if self._passing else [form.keeps for form in self._kept]
        return [*kept, *self.products.contents()]

    def finish(self) -> None:
        """Make the products of the whole job, where they are not there.

        Raises:
            StorageError: they can't be written.
        """
        with storage(self.path):
            self.manifest.take_up()
            if self.manifest.products is None:
                self.manifest.products = self.products.made()
            if self._passing:
                self.manifest.chunks = {}
            self.manifest.write()  # without the journals, which tell of the shards
            self.manifest.remove_journals()
            if self._passing:
                for path in self.path.glob("images-*.npz"):
                    path.unlink()

    def _images(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        form = next(form for form in self._kept if form.array == "images")
        for index in range(len(self.chunks)):
            yield read_files(self.path, form.paths(self.chunks[index]))

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
