"""Where runtimes keep what took long to make: below the environment's DGFAST_CACHE_DIR, or ~/.cache/dgfast."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept; it need not exist yet."""
    root = os.environ.get("DGFAST_CACHE_DIR")
    return (Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dgfast") / kind
