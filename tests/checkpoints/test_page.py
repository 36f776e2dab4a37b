"""What docs/checkpoints.md shows is what the command prints."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgfast.convert import main
from tests.support.paths import ROOT

_PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def test_checkpoints_page_shows_what_convert_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.search(
        r"```python\n([^`]*?)```\n+```sh\npython -m dgfast\.convert ([^\n]*)\n```\n+```text\n(.*?)```", _PAGE, re.S
    )
    assert shown is not None
    made, arguments, printed = shown.groups()
    monkeypatch.chdir(tmp_path)
    exec(compile(made, "docs/checkpoints.md", "exec"), {})
    result = CliRunner().invoke(main, shlex.split(arguments))
    assert (result.exit_code, result.output) == (0, printed)
