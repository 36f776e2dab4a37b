"""Sets of images as `python -m dgfast.evaluate` judges them, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def judged(folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, float]]:
    """Those metrics of each folder that `dgfast.outputs.write_images` wrote; the report lies beside the first."""
    report = folders[0].parent / "quality.json"
    command = [sys.executable, "-m", "dgfast.evaluate", *map(str, folders), "--json", str(report)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = {row["folder"]: row["metrics"] for row in json.loads(report.read_text())["rows"]}
    return [{name: rows[str(folder)][name]["value"] for name in names} for folder in folders]
