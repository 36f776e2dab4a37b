"""What a file from a stranger may ask for, at most. SECURITY.md says what follows from these numbers.

Reading takes no more memory than twice the file's honest size and 1 GB, and no more time than 10 s and a time
proportional to that size. Honest files stay far below each of the numbers.
"""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dgfast.errors import UserError

JSON_BYTES = 8 * 2**20
"""Of a file of JSON, and of the header of a safetensors file, which takes about 100 bytes a tensor."""

JSON_ITEMS, JSON_NESTING = 1_000_000, 20
"""Brackets and commas in a text of JSON; lists and objects within one another."""

PICKLE_STEPS = 4_000_000
"""Of all programs in one file. A tensor takes about 50; what a step makes takes 150 bytes at most."""

PICKLE_BYTES = 256 * 2**20
"""Of the program in a zip file, whose tensors lie outside it."""

PICKLE_TEXT = 64 * 2**20
"""Bytes of text in all programs of one file; in memory a letter takes up to four."""

ZIP_DIRECTORY = 32 * 2**20
"""Bytes of the directory of a zip file, which takes about 80 a storage."""

KEYWORD_NUMBER, KEYWORD_TEXT, KEYWORD_LIST = 100_000, 100, 64
"""A keyword of a network: the largest whole number, letters of the longest text, items of the longest list."""

MISSING_TENSORS = 10_000
"""How many more a network may have than its weights: so many are counted as missing."""

OBSERVATION_BYTES = 256 * 2**20
"""Of a file of one image and its mask."""

IMAGE_SIZE = 4096
"""Height and width of the images of a network, which its weights need not tell."""


def open_file(path: Path) -> IO[bytes]:
    """The file, opened for reading.

    Raises:
        UserError: it cannot be read, or is a folder, a pipe or a device, whose end might never come.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot read {str(path)!r}: {error}") from error
    raise UserError(f"cannot read {path}: it is a folder, a pipe or a device, not a file")


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        UserError: the file cannot be read. ValueError: it is too large, or see `parse_json`.
    """
    with open_file(path) as stream:
        return parse_json(read_text(stream, JSON_BYTES + 1))


def read_text(stream: IO[bytes], length: int) -> str:
    """So many bytes of the file, or what is left of it.

    Raises:
        ValueError: more than `JSON_BYTES`.
    """
    content = stream.read(min(length, JSON_BYTES + 1))
    if len(content) > JSON_BYTES:
        raise ValueError(f"it has more than {JSON_BYTES:,} bytes of JSON")
    return content.decode()


def parse_json(text: str) -> Any:
    """The value of a text of JSON.

    Raises:
        ValueError: broken, of too many items, nested too deeply, with NaN, infinity, or a name twice in an object.
    """
    if sum(map(text.count, "[{,")) > JSON_ITEMS:
        raise ValueError(f"it has more than {JSON_ITEMS:,} items")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(JSON_NESTING + 1):
        level = [item for outer in level for item in _items(outer)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuse what no constructor of a network takes, before one multiplies it.

    Raises:
        ValueError: a keyword that is not a number, a word, None or a flat list of them, or exceeds the bounds.
    """
    for name, value in keywords.items():
        items = value if isinstance(value, list) else [value]
        plain = len(items) <= KEYWORD_LIST and all(type(item) in (type(None), bool, int, float, str) for item in items)
        if not plain:
            raise ValueError(f"{name!r:.80} is not a number, a word or a short list of them")
        for item in items:
            _check_item(name, item)


def _check_item(name: str, item: Any) -> None:
    most = IMAGE_SIZE if name in ("img_resolution", "image_size", "input_size") else KEYWORD_NUMBER
    if isinstance(item, str) and len(item) > KEYWORD_TEXT:
        raise ValueError(f"{name!r:.80} has {len(item):,} letters, and {KEYWORD_TEXT} is the most")
    if isinstance(item, str) and not item.isprintable():
        raise ValueError(f"{name!r:.80} is {item!r}, which cannot be shown")
    if isinstance(item, float) and not math.isfinite(item):
        raise ValueError(f"{name!r:.80} is {item}, not a finite number")
    if isinstance(item, int) and item > most:
        raise ValueError(f"{name!r:.80} is {str(item)[:40]}, and {most:,} is the most")
    if (
        isinstance(item, int)
        and item < 0
        and (item, name) not in {(-1, "num_head_channels"), (-1, "num_heads_upsample")}
    ):
        raise ValueError(f"{name!r:.80} is negative")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name stands twice in it")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} in it is no number of JSON")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
