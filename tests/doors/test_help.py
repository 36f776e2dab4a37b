"""`--help`: sections, symbols and what the bundle says, without torch."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dgfast import __version__, sample
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.guidance import GUIDANCES, Guidance
from dgfast.options import Command, Group, Option, sections_of_help
from tests.support.paths import ROOT

_MODULES = ["sample", "convert", "evaluate", "report", "train", "export.to_onnx", "export.to_trt"]


def _help(*arguments: str) -> str:
    result = CliRunner().invoke(sample.main, [*arguments, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    return result.output


def _commands(module: str) -> list[click.Command]:
    main = import_module(f"dgfast.{module}").main
    return list(main.commands.values()) if isinstance(main, click.Group) else [main]


@pytest.mark.parametrize("module", _MODULES)
def test_every_option_has_a_section_and_every_command_a_version(module: str) -> None:
    for command in _commands(module):
        assert isinstance(command, Command)
        context = click.Context(command)
        ours = [p for p in command.get_params(context) if p is not command.get_help_option(context)]
        loose = {p.name for p in ours if isinstance(p, click.Option) and not isinstance(p, Option)}
        assert loose == {"version"}
        assert CliRunner().invoke(command, ["--version"]).output == f"dgfast {__version__}\n"


def test_sections_stand_in_one_order_whatever_the_order_of_the_options() -> None:
    lines = _help().splitlines()
    sections = [section for section in sections_of_help() if f"{section}:" in lines]
    assert sections == [section for section in sections_of_help() if section is not Group.TRAINING]
    assert [lines.index(f"{name}:") for name in sections] == sorted(lines.index(f"{name}:") for name in sections)


def test_every_default_of_the_bundle_that_an_option_changes_is_shown() -> None:
    settings = asdict(SamplingConfig()) | asdict(GuidanceConfig(dg_weight=5.0))
    context = click.Context(sample.main)
    for parameter in sample.main.get_params(context):
        default = settings.get(parameter.name or "")
        if isinstance(default, int | float | str):
            text = "off" if default is False else default if isinstance(default, str | bool) else f"{default:g}"
            record = parameter.get_help_record(context)
            assert record is not None and record[1].endswith(f"[mnist32: {text}]")


@pytest.mark.parametrize("order", [0, 1])
def test_help_shows_the_defaults_of_the_bundle_on_the_command_line(order: int, tmp_path: Path) -> None:
    description = {"sampling": {"num_steps": 250}, "guidance": {"dg_window": [0.1, "inf"], "dg_schedule": [[0.1, 0]]}}
    (tmp_path / "adm").mkdir()
    (tmp_path / "adm" / "bundle.json").write_text(json.dumps(description))
    arguments = ["--help", "--bundle", str(tmp_path / "adm")]
    shown = CliRunner().invoke(sample.main, arguments[order:] + arguments[:order], terminal_width=200).output
    for line in ("above 0.  [adm: 250]", "acts.  [adm: 0.1,inf]", "points.  [adm: 0.1:0]", "off.  [adm: 0]"):
        assert line in shown


@pytest.mark.parametrize("text", [None, "", "[]", '{"sampling": 3, "guidance": {}}', "[" * 100_000])
def test_help_needs_no_bundle_that_can_be_read(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "bundle.json").write_text(text)
    assert "--steps" in _help("--bundle", str(tmp_path))


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda guidance: guidance.name)
def test_the_symbols_of_a_guidances_weights_are_those_of_its_formula(guidance: type[Guidance]) -> None:
    symbols = {one.symbol for one in guidance.options() if one.attribute and one.symbol}
    assert symbols and all(re.search(rf"\b{symbol}\b", guidance.formula) for symbol in symbols)


@pytest.mark.parametrize("module", ["sample", "convert", "evaluate", "report", "train"])
def test_help_does_not_import_torch(module: str) -> None:
    code = (
        f"import sys, runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('dgfast.{module}', run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
