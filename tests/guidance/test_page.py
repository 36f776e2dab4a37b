"""What docs/guidance.md shows can be drawn as shown, and no guidance is left out of it."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dgfast.guidance.__main__ import table
from dgfast.sample import main
from tests.support.paths import ROOT

_PAGE = ROOT / "docs" / "guidance.md"
_TEXT = _PAGE.read_text()
_SHOWN = re.findall(r"`(--[a-z-]+ [0-9][^`]*)`", _TEXT)


@pytest.mark.parametrize("options", _SHOWN)
def test_guidance_page_pictures_can_be_drawn(options: str, tmp_path: Path) -> None:
    short = ["--labels", "0-9", "--seeds", "0-1", "--steps", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, short[:2] + options.split() + short[2:])
    assert result.exit_code == 0, result.output


def test_guidance_page_has_what_the_guidances_say_of_themselves() -> None:
    assert table() in _TEXT  # python -m dgfast.guidance prints it


@pytest.mark.parametrize("option", ["weight", "scale", "autoguidance", "diversity", "fidelity", "guidance", "dg-every"])
def test_guidance_page_names_every_option_of_that_kind(option: str) -> None:
    names = [name for parameter in main.get_params(click.Context(main)) for name in parameter.opts if option in name]
    assert names and all(f"`{name}" in _TEXT for name in names)
