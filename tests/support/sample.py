"""The door `python -m dgfast.sample`, called in this process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from dgfast.image_folder import read_images
from dgfast.sample import main


def draw(bundle: Path, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle), "--seeds", "0-3", "--steps", "3", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *options])


def images_of(out: Path) -> np.ndarray:
    return read_images(out)[0]


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())
