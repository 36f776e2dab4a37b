"""Where runtimes keep what took long to make: below the environment's DGFAST_CACHE_DIR, or ~/.cache/dgfast."""

import os
from pathlib import Path

from dgfast.errors import UserError


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept; it need not exist yet."""
    root = os.environ.get("DGFAST_CACHE_DIR")
    return (Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dgfast") / kind


def unwritable(folder: Path, error: OSError) -> UserError:
    """What to say where nothing can be kept there."""
    return UserError(f"{folder}: {error.strerror}; set DGFAST_CACHE_DIR to a folder that can be written to")
