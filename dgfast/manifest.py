"""`manifest.json`: what a folder's images are, who draws them, and which of them are there.

It is written before the first image and kept current. A chunk of images counts from the moment that its process noted
its checksum in its journal, one line a chunk, which costs nothing; the manifest takes these lines up now and then.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.files import replacing, sha256
from dgfast.guidance.declaration import all_options

FORMAT = 2
NAME = "manifest.json"
_JOURNAL = ".journal-"
_SECONDS_BETWEEN_SAVES = 10.0
_DIGITS = 64  # of a SHA-256
_NONE = "none"


class Manifest:
    """The manifest of one job in a folder, and the journals beside it.

    Attributes:
        images: of the whole job. chunks: index of each chunk that is there -> SHA-256 over its files.
        products: name of each file that was made in the end -> its SHA-256; None until then.
    """

    def __init__(
        self, folder: Path, job: Mapping[str, Any], images: int, typed: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            job: everything that decides on the images and their files, as plain data.
            typed: what of it has another name where a user gives it, see `options.names_as_typed`.
        """
        self.path, self.images, self._typed = folder / NAME, images, typed or {}
        self.job: dict[str, Any] = json.loads(json.dumps(strict(job)))
        self.chunks: dict[int, str] = {}
        self.products: dict[str, str] | None = None
        self.runs: list[dict[str, Any]] = []
        self._owner: dict[str, Any] | None = None
        self._saved = -math.inf

    def read(self) -> None:
        """Take up what an earlier run of the same job left; nothing in a new folder.

        Raises:
            UserError: another job, or no manifest of this dgfast.
        """
        if not self.path.exists():
            return
        content = _read_json(self.path)
        remedy = "name a new folder, or give --overwrite"
        if content is None or content.get("format") != FORMAT or not _is_proper(content):
            raise UserError(
                f"--out {self.path.parent}: its {NAME} is damaged, or that of another dgfast version; {remedy}"
            )
        if differences := _differences(content["job"], self.job, self._typed):
            raise UserError(f"--out {self.path.parent} holds another job: {differences}; {remedy}")
        self.chunks = {int(index): digest for index, digest in content["chunks"].items()}
        self.products, self.runs = content.get("products"), content["runs"]
        self.take_up()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Note that this process begins to draw, and empty the journals."""
        self._owner = {"pid": os.getpid(), "host": socket.gethostname()}
        self.runs.append({**strict(run), "began": _now()})
        self.write()  # without the journals: what they say was held against the files, and may have been wrong
        self.remove_journals()

    def end(self, **outcome: Any) -> None:
        """Note how this run ended."""
        self.runs[-1] |= {"ended": _now(), **strict(outcome)}
        self._owner = None

    def save(self) -> None:
        """Write the manifest in one move, with what the journals say."""
        self.take_up()
        self.write()

    def write(self) -> None:
        """Write the manifest in one move, as it stands here."""
        content = {
            "format": FORMAT,
            "job": self.job,
            "images": self.images,
            "complete": self.products is not None,
            **({"owner": self._owner} if self._owner else {}),
            "runs": self.runs,
            **({} if self.products is None else {"products": self.products}),
            "chunks": {str(index): self.chunks[index] for index in sorted(self.chunks)},
        }
        with replacing(self.path) as file:
            file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        self._saved = time.monotonic()

    def save_now_and_then(self) -> None:
        """Write it, unless that was done a moment ago: the journals have the rest."""
        if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def note(self, index: int, digest: str, rank: int) -> None:
        """Note in the journal of this process that a chunk's files are there."""
        with self._journal(rank).open("a") as journal:
            journal.write(f"{index} {digest}\n")

    def take_up(self) -> None:
        """Add to `chunks` what the journals say."""
        for path in self.path.parent.glob(f"{_JOURNAL}*"):
            for line in path.read_text(errors="replace").splitlines():
                index, _, digest = line.partition(" ")
                if index.isdecimal() and len(digest) == _DIGITS:  # a line that was torn counts for nothing
                    self.chunks[int(index)] = digest

    def remove_journals(self) -> None:
        for path in self.path.parent.glob(f"{_JOURNAL}*"):
            path.unlink()

    def _journal(self, rank: int) -> Path:
        return self.path.with_name(f"{_JOURNAL}{rank}")


def recorded(guidance: GuidanceConfig) -> dict[str, Any]:
    """The options by name, and in the place of a file's name its checksum: what is in it decides."""
    files = {one.name: getattr(guidance, one.name) for one in all_options() if one.file}
    return asdict(guidance) | {name: path and sha256(Path(path)) for name, path in files.items()}


def owner(folder: Path) -> str:
    """Who draws into a folder, for a message."""
    noted = (_read_json(folder / NAME) or {}).get("owner")
    if isinstance(noted, dict) and {"pid", "host"} <= noted.keys():
        return f"process {noted['pid']} on {noted['host']}"
    return "another process"


def content_of(folder: Path) -> dict[str, Any] | None:
    """What the folder's manifest holds; None where there is none, or none of JSON."""
    return _read_json(folder / NAME)


def promised_images(folder: Path) -> int | None:
    """How many images the folder's manifest promises; None where there is none that says so."""
    promised = (_read_json(folder / NAME) or {}).get("images")
    return promised if isinstance(promised, int) else None


def strict(value: Any) -> Any:
    """`value` with infinities as text, for which JSON has no number."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, FileNotFoundError):
        return None
    return content if isinstance(content, dict) else None


def _is_proper(content: dict[str, Any]) -> bool:
    chunks, products, runs = content.get("chunks"), content.get("products", {}), content.get("runs")
    return (
        isinstance(content.get("job"), dict)
        and isinstance(runs, list)
        and all(isinstance(run, dict) for run in runs)
        and isinstance(chunks, dict)
        and all(index.isdecimal() and isinstance(digest, str) for index, digest in chunks.items())
        and isinstance(products, dict)
        and all(Path(name).name == name for name in products)
    )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], typed: Mapping[str, str], most: int = 4) -> str:
    """Which options two jobs differ in: "--steps 18 there, 12 here"."""
    flat_there, flat_here = dict(_flat(there)), dict(_flat(here))
    names = [n for n in {**flat_there, **flat_here} if flat_there.get(n, _NONE) != flat_here.get(n, _NONE)]
    pairs = [(typed.get(n, n), *(_short(flat.get(n, _NONE)) for flat in (flat_there, flat_here))) for n in names]
    texts = [f"{name} {old} there, {new} here" for name, old, new in pairs]
    return "; ".join(texts[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, _NONE if value is None else value


def _short(value: Any, most: int = 40) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
