"""What the README shows runs as shown."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgfast.sample import main

_README = Path(__file__).parents[1] / "README.md"
_BLOCKS = re.findall(r"```python\n(.*?)```", _README.read_text(), flags=re.DOTALL)
_COMMANDS = re.findall(r"^python -m dgfast\.sample(.*)$", _README.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("block", _BLOCKS, ids=range(len(_BLOCKS)))
def test_readme_python_runs(block: str) -> None:
    namespace: dict[str, object] = {}
    exec(compile(block, str(_README), "exec"), namespace)
    assert tuple(namespace["images"].shape[1:]) == (1, 32, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [c for c in _COMMANDS if "--bundle" not in c])
def test_readme_sample_options_exist(command: str, tmp_path: Path) -> None:
    """Each shown command, cut down to two images and four steps where it asks for more."""
    words = command.split("#")[0].split()
    short = ["--seeds", "0-1", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [w for w in words if w != "--compile"] + short)
    assert result.exit_code == 0, result.output


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)", _README.read_text())
    assert links and all((_README.parent / link).exists() for link in links)


def test_readme_commands_are_make_targets() -> None:
    for target in ("sample", "test"):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=_README.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
