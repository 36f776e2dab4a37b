"""The command `dgfast`, and what the package shows of itself."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from typing import Any

import pytest
from click.testing import CliRunner

import dgfast
from dgfast.__main__ import main
from tests.support.paths import ROOT

_COMMANDS = ["sample", "convert", "train", "evaluate", "report"]


def test_the_console_script_is_the_module() -> None:
    (script,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    module, _, function = script[1].partition(":")
    assert script[0] == "dgfast" and getattr(import_module(module), function) is main


def test_every_command_is_listed_and_is_its_modules_own() -> None:
    listed = CliRunner().invoke(main, ["--help"])
    assert listed.exit_code == 0 and re.findall(r"^  (\w+)  +\w", listed.output, flags=re.MULTILINE) == _COMMANDS
    for name in _COMMANDS:
        shown = CliRunner().invoke(main, [name, "--help"], prog_name="dgfast")
        assert shown.exit_code == 0 and shown.output.startswith(f"Usage: dgfast {name} ")


@pytest.mark.parametrize("arguments", [[], *([name] for name in _COMMANDS), ["train", "score"]])
def test_every_command_says_its_version(arguments: list[str]) -> None:
    said = CliRunner().invoke(main, [*arguments, "--version"])
    assert said.exit_code == 0 and said.output == f"dgfast {dgfast.__version__}\n"


def test_an_unknown_command_is_one_line() -> None:
    said = CliRunner().invoke(main, ["draw"], prog_name="dgfast")
    assert said.exit_code == 2 and said.output.splitlines()[-1] == "Error: No such command 'draw'."


def test_the_list_of_commands_imports_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('dgfast', run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_dir_shows_the_public_names() -> None:
    assert set(dir(dgfast)) == {*dgfast.__all__, "__version__"}
    assert all(hasattr(dgfast, name) for name in dir(dgfast))


def test_messages_name_commands_that_a_wheel_has() -> None:
    """A wheel has neither the Makefile nor the folder export/."""
    sources = [path for folder in ("dgfast", "export", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    texts = [text for path in sources for text in re.findall(r'f?"[^"\n]*"', path.read_text())]
    assert [text for text in texts if re.search(r"export/\w+\.py|\bmake (?:sample|test)\b", text)] == []


def test_repr_of_networks_and_samplers_is_two_lines() -> None:
    networks = dgfast.load("mnist32", guidance=dgfast.GuidanceConfig(autoguidance=1.5))
    assert repr(networks).splitlines() == [
        "Networks: EDMPrecond of SongUNet (317,297 weights), images 1 x 32 x 32, 10 classes",
        "  beside it: reference EDMPrecond of SongUNet (80,505 weights)",
    ]
    guided = dgfast.Sampler(networks, dgfast.SamplingConfig(num_steps=4), dgfast.GuidanceConfig(autoguidance=1.5))
    assert repr(guided).splitlines() == [
        "Sampler: heun, 4 steps from sigma 80, 14 score evaluations and 0 guidance gradients an image",
        "  guidance: autoguidance=1.5; on cpu",
    ]
    assert repr(dgfast.Sampler(networks)).endswith("\n  guidance: none; on cpu")
    assert repr(dgfast.OneStep.load("mnist32")).splitlines() == [
        "OneStep: Generator (277,004 weights), 64 latents, 10 classes",
        "  one forward an image; on cpu",
    ]


def test_repr_takes_a_denoiser_that_is_no_module() -> None:
    class Denoiser:
        img_channels, img_resolution, label_dim, sigma_min, sigma_max = 3, 8, 0, 0.0, 80.0

        def __call__(self, x: Any, sigma: Any, class_labels: Any) -> Any:
            return x

        def round_sigma(self, sigma: Any) -> Any:
            return sigma

    lines = repr(dgfast.Networks(Denoiser())).splitlines()
    assert lines == ["Networks: Denoiser, images 3 x 8 x 8, unconditional", "  beside it: none"]
