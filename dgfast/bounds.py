"""What a file from a stranger may ask for, at most. SECURITY.md says what follows from these numbers.

Reading takes no more memory than twice the file's honest size and 1 GB, and no more time than 10 s and a time
proportional to the size. Honest files stay far below each of the numbers.
"""

import stat
from pathlib import Path
from typing import IO

from dgfast.errors import UserError

JSON_BYTES = 8 * 2**20
"""Of a `bundle.json`, and of the header of a safetensors file, which takes about 100 bytes a tensor."""

PICKLE_STEPS = 4_000_000
"""Of all programs in one file. A tensor takes about 30; a step makes no more than about 200 bytes."""

PICKLE_TEXT = 64 * 2**20
"""Bytes of text in all programs of one file; in memory a letter takes up to four."""

ZIP_DIRECTORY = 32 * 2**20
"""Bytes of the directory of a zip file, which takes about 80 a storage."""


def open_file(path: Path) -> IO[bytes]:
    """The file, opened for reading.

    Raises:
        UserError: it cannot be read, or is a folder, a pipe or a device, from which reading might never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"cannot read {path}: it is a folder, a pipe or a device, not a file")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
