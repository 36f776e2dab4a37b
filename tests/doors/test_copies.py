"""A copy of the repository without symbolic links, as git makes it on Windows unless told otherwise."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def without_links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its two links turned into text files that hold where they led."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "dgfast", copy / "dgfast", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "export", copy / "export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for link in (copy / "dgfast").iterdir():
        if link.is_symlink():
            leads_to = str(link.readlink())
            link.unlink()
            link.write_text(leads_to)
    return copy


@pytest.mark.parametrize("command", [
    ["-m", "dgfast", "sample"],
    ["-m", "dgfast.sample", "--compile"],
    ["-m", "dgfast.sample", "--runtime", "onnx"],
    ["-m", "dgfast.export.to_onnx"],
    ["setup.py", "egg_info"],
])  # fmt: skip
def test_a_copy_without_links_says_so_in_one_line(without_links: Path, command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=without_links, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "without symbolic links" in line and "git config core.symlinks true" in line


def test_the_real_copy_has_links() -> None:
    assert {path.name for path in (ROOT / "dgfast").iterdir() if path.is_symlink()} == {"export", "kernels"}
