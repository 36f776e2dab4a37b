"""Whether the files of a folder are what its manifest says: the checksums that `dgfast sample` noted."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from dgfast.chunks import Chunk
from dgfast.errors import UserError, one_line
from dgfast.files import sha256
from dgfast.manifest import NAME
from dgfast.outputs import FORMATS
from dgfast.ranges import Ranges

_MOST_SEEDS = 10**8
"""Of a job; names of so many files are made one by one."""


def require_intact(folder: Path, content: Mapping[str, Any]) -> None:
    """
    Args:
        content: of the folder's manifest; nothing is asked of one without checksums.

    Raises:
        UserError: a file that is missing, or is not what it was when it was written.
    """
    try:
        noted = list(_noted(content))
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / NAME} is damaged ({one_line(error, most=80)}); move it elsewhere, and the images are judged as "
            "they are"
        ) from error
    for names, digest in noted:
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing is not None:
            raise UserError(f"{folder / missing} is missing; the command that drew the folder draws it again")
        if digest not in _digests(folder, names):
            rest = f" or one of the {len(names) - 1} files of its batch" if len(names) > 1 else ""
            raise UserError(
                f"{folder / names[0]}{rest} is damaged: its checksum is not that of manifest.json; the command that "
                "drew the folder draws it again"
            )


def _noted(content: Mapping[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Names of files and the checksum over them, as far as a manifest has them."""
    products, chunks, job = (content.get(name) for name in ("products", "chunks", "job"))
    for name, digest in (products if isinstance(products, dict) else {}).items():
        if Path(name).name == name:
            yield [name], str(digest)
    if not (isinstance(chunks, dict) and isinstance(job, dict) and isinstance(job.get("batch"), int)):
        return
    kept = [name for name in job.get("formats", ()) if name in FORMATS]
    if not kept and products:  # its shards went once what was made of them was there
        return
    seeds, size = Ranges.parse(str(job.get("seeds", ""))) if job.get("seeds") else Ranges(), max(job["batch"], 1)
    if len(seeds) > _MOST_SEEDS:
        raise ValueError(f"{len(seeds):,} seeds")
    for index, digest in chunks.items():
        start = int(index) * size
        chunk = Chunk(int(index), seeds[start : start + size])
        yield [name for form in kept or ["npz"] for name in FORMATS[form].paths(chunk)], str(digest)


def _digests(folder: Path, names: list[str]) -> Iterator[str]:
    """The checksum of a file, or those over several, whose formats stand in the manifest in another order."""
    if len(names) == 1:
        yield sha256(folder / names[0])
        return
    by_format: dict[str, list[bytes]] = {}
    for name in names:
        by_format.setdefault(name.partition("-")[0] if name.endswith(".npz") else "png", []).append(
            (folder / name).read_bytes()
        )
    for order in permutations(by_format.values()):
        digest = hashlib.sha256()
        for part in order:
            for file in part:
                digest.update(file)
        yield digest.hexdigest()
