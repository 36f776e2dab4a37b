"""A package that an extra installs is missing: one line names the extra."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dgfast.errors import UserError
from dgfast.extras import EXTRAS, require
from tests.support.paths import ROOT


def test_every_package_is_in_the_extra_that_it_is_said_to_be_in() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(requirement.startswith(f"{package}>=") for requirement in extras[extra])


def test_only_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prdc", None)
    require("torchmetrics")
    with pytest.raises(UserError, match=r"^prdc is not installed: pip install 'dgfast\[evaluate\]'$"):
        require("torchmetrics", "prdc")


_RESULTS = ROOT / "benchmarks/results/cpu-2-cores.json"
_TRAIN = ["-m", "dgfast", "train", "score", "--bundle", "b"]
_CASES = {
    "evaluate": ("torchmetrics", ["-m", "dgfast", "evaluate", "out"], "pip install 'dgfast[evaluate]'"),
    "train": ("mlxtend", _TRAIN, "pip install 'dgfast[train]'"),
    "to-onnx": ("onnx", ["-m", "dgfast.export.to_onnx"], "pip install 'dgfast[onnx]'"),
    "example": ("onnxruntime", ["examples/onnx_only.py", "a", "b"], "pip install 'dgfast[onnx]'"),
    "report": ("matplotlib", ["-m", "dgfast", "report", str(_RESULTS)], "pip install 'dgfast[report]'"),
    "table": ("matplotlib", ["-m", "benchmarks.report", str(_RESULTS), "--out", "."], "dgfast[report]'"),
}


@pytest.mark.parametrize(("package", "command", "remedy"), _CASES.values(), ids=_CASES)
def test_a_missing_package_is_one_line(package: str, command: list[str], remedy: str, tmp_path: Path) -> None:
    """As a user without the package meets it: in a process of its own, where importing it fails."""
    run = "module" if command[0] == "-m" else "path"
    name, *arguments = command[1:] if run == "module" else [str(ROOT / command[0]), *command[1:]]
    code = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv[1:] = {arguments!r}\nrunpy.run_{run}({name!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert remedy in done.stderr.splitlines()[-1]
    assert f"{package} is not installed" in done.stderr
