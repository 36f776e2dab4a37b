"""Who may import whom inside dgfast, read from the source."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgfast
from tests.support.paths import ROOT

PACKAGE = ROOT / "dgfast"
MODULES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py"), *(PACKAGE / "export").glob("*.py")})
HEAVY = {"mlxtend", "torchmetrics", "prdc", "matplotlib", "onnx", "onnxruntime", "tensorrt", "triton", "diffusers"}
# Room -> the rooms it may import (its own besides), and the packages beyond the standard library.
ROOMS = {
    "errors": (set(), {"click"}),
    "bounds": ({"errors"}, set()),
    "extras": ({"errors"}, set()),
    "ranges": (set(), set()),
    "files": (set(), set()),
    "manifest": ({"config", "errors", "files", "guidance"}, set()),
    "job_folder": (
        {"chunks", "errors", "files", "image_folder", "manifest", "outputs", "products", "ranges"},
        {"numpy", "filelock"},
    ),
    "chunks": ({"ranges"}, {"torch"}),
    "products": ({"chunks", "config", "files", "outputs"}, {"numpy"}),
    "team": ({"errors", "ranges"}, {"torch"}),
    "config": ({"errors", "guidance", "solvers"}, set()),
    "conditions": ({"errors", "guidance"}, {"torch"}),
    "vp": (set(), {"torch"}),
    "noise_levels": ({"config", "errors", "vp"}, {"torch"}),
    "randomness": ({"errors"}, {"torch"}),
    "kernels": (set(), {"torch", "triton"}),
    "ops": ({"errors", "extras", "kernels"}, {"torch"}),
    "solvers": ({"errors", "vp"}, {"torch"}),
    "magnitude": (set(), {"torch"}),
    "flow": ({"noise_levels", "vp"}, {"torch"}),
    "denoiser": ({"flow", "magnitude", "noise_levels"}, {"torch"}),
    "nets": ({"denoiser", "errors", "extras", "magnitude", "ops"}, {"torch", "numpy", "diffusers"}),
    "presets": ({"errors"}, set()),
    "guidance": ({"bounds", "errors", "vp"}, {"torch", "numpy"}),
    "functions": ({"errors", "graph", "runtimes"}, {"torch"}),
    "graph": ({"IMPORTED_AT", "errors", "ops"}, {"torch"}),
    "runtimes": ({"bounds", "devices", "errors", "extras", "graph", "ops"}, {"torch", "numpy", "onnx", "onnxruntime"}),
    "pure_function": ({"graph", "guidance"}, {"torch"}),
    "job": (
        {"conditions", "config", "denoiser", "devices", "errors", "flow", "graph", "guidance", "networks"}
        | {"noise_levels", "plan", "pure_function", "solvers"},
        {"torch"},
    ),
    "sampler": (
        {"conditions", "config", "devices", "errors", "guidance", "job", "networks", "plan", "randomness"}
        | {"runtimes", "solvers", "stepping"},
        {"torch"},
    ),
    "stepping": ({"graph", "guidance", "job", "networks", "plan", "runtimes", "solvers"}, {"torch"}),
    "engines": ({"bundle", "config", "errors", "graph", "guidance", "pure_function", "runtimes", "solvers"}, {"torch"}),
    "outputs": ({"chunks", "errors", "files", "ranges"}, {"torch", "numpy", "PIL"}),
    "plan": ({"config", "denoiser", "errors", "guidance", "networks", "noise_levels", "solvers"}, {"torch"}),
    "option_types": ({"ranges"}, {"click"}),
    "options": ({"__version__", "bounds", "config", "guidance", "option_types"}, {"click"}),
    "job_options": ({"config", "guidance", "option_types", "options", "solvers"}, {"click"}),
    "settings": ({"bundle", "config", "errors", "guidance", "options", "presets"}, {"click"}),
    "execution": ({"bundle", "engines", "errors", "runtimes", "settings"}, {"click"}),
    "one_step": (
        {"bundle", "devices", "errors", "graph", "guidance", "networks", "plan", "pure_function", "randomness"}
        | {"runtimes", "sampler"},
        {"torch"},
    ),
    "evaluation": (
        {"bounds", "bundle", "checkpoints", "chunks", "devices", "errors", "files", "guidance", "image_folder"}
        | {"manifest", "nets", "networks", "outputs", "ranges", "training"},
        {"numpy", "prdc", "torch", "torchmetrics"},
    ),
    "reporting": (
        {"__version__", "bounds", "bundle", "chunks", "config", "devices", "errors", "files", "graph", "guidance"}
        | {"image_folder", "manifest", "networks", "outputs", "plan", "pure_function", "ranges", "runtimes", "sampler"},
        {"torch", "numpy", "matplotlib"},
    ),
    "batches": ({"chunks", "errors", "one_step", "outputs", "plan", "sampler"}, {"torch", "numpy"}),
}
# Folder of a runtime -> the folders of others from which it takes something.
RUNTIMES = {"cpu": set(), "cuda": {"cpu", "package"}, "onnx": set(), "package": {"cpu"}, "tensorrt": {"onnx"}}
DOORS = {"__main__", "convert", "evaluate", "report", "sample", "train"}


def imports(path: Path, whole_file: bool = True) -> Iterator[str]:
    """Full names of what a module imports, but for types; without `whole_file`, only what runs when it is imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not typing_only and (whole_file or not function):
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("room", ROOMS)
def test_architecture_rooms_import_only_what_they_may(room: str) -> None:
    rooms, packages = ROOMS[room]
    paths = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in (room, f"{room}.py")]
    assert paths, f"dgfast has no {room}"
    for name in (name for path in paths for name in imports(path)):
        first, second, *_ = [*name.split("."), ""]
        if first == "dgfast":
            assert second in rooms | {room}, f"{room} may not import {name}"
        else:
            assert first in packages | sys.stdlib_module_names, f"{room} may not import {name}"


@pytest.mark.parametrize("folder", RUNTIMES)
def test_architecture_runtimes_stand_beside_one_another(folder: str) -> None:
    """Each has one `build`, and none imports the table that it stands in."""
    paths = [*(PACKAGE / "runtimes" / folder).rglob("*.py")]
    assert PACKAGE / "runtimes" / folder / "build.py" in paths
    assert {path.parent.name for path in (PACKAGE / "runtimes").glob("*/__init__.py")} == {*RUNTIMES}
    for name in (name for path in paths for name in imports(path) if name.startswith("dgfast.runtimes.")):
        assert name.split(".")[2] in RUNTIMES[folder] | {folder}, f"{folder} may not import {name}"


def test_architecture_nobody_imports_a_door() -> None:
    for path in MODULES:
        doors = {f"dgfast.{door}" for door in DOORS - {path.stem if path.parent == PACKAGE else ""}}
        inside = [name for name in imports(path) if doors & {name, name.rpartition(".")[0]}]
        assert not inside or path.name == "__main__.py", f"{path} may not import {inside}"


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_architecture_package_needs_neither_its_tools_nor_heavy_packages(path: Path) -> None:
    """What is slow to import or not always installed is imported inside the function that needs it."""
    first_names = {name.split(".")[0] for name in imports(path)}
    assert not first_names & {"tests", "benchmarks", "export"}
    inside = path.is_relative_to(PACKAGE / "export")
    assert inside or not any(name.startswith("dgfast.export") for name in imports(path)), "not for importing"
    kernel = path.is_relative_to(PACKAGE / "kernels")
    own = {"triton"} if kernel else {"diffusers"} if path == PACKAGE / "diffusers.py" else set()
    assert not {name.split(".")[0] for name in imports(path, whole_file=False)} & (HEAVY - own)
    assert not any(name.startswith("dgfast.diffusers") for name in imports(path)), "for its users alone"
    ours = {name for name in imports(path) if name.startswith("dgfast.kernels")}
    assert kernel or path.name == "ops.py" or not ours, "only ops.py chooses kernels"


def test_architecture_three_names_of_the_package_lead_to_its_tools() -> None:
    """They are looked up when they are asked for: `import dgfast` reads none of `export/`."""
    homes = {name for name, home in dgfast._HOMES.items() if home.split(".")[0] == "export"}
    assert homes == {"export_onnx", "export_package", "export_tensorrt"}
    code = "import sys, dgfast; assert not [name for name in sys.modules if name.startswith('dgfast.export')]"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 0


def test_architecture_package_works_without_heavy_packages() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(HEAVY)}))  # None: importing it raises ImportError
import dgfast
assert "torch" not in sys.modules, "import dgfast takes as long as torch"
import dgfast.ops, dgfast.nets, dgfast.sampler
import dgfast.runtimes.cpu.build, dgfast.runtimes.cuda.build, dgfast.runtimes.onnx.build
dgfast.Sampler(dgfast.load("mnist32"), guidance=dgfast.GuidanceConfig(dg_weight=1.0))([0])
assert "torch._dynamo" not in sys.modules, "torch's compiler takes as long to import as torch"
for name in ("load", "OneStep", "Sampler", "Networks", "SamplingConfig", "GuidanceConfig"):
    assert name in dgfast.__all__ and getattr(dgfast, name).__name__ == name
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_architecture_page_has_every_room() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    on_the_page = {name.rstrip("/") for cell in first_cells for name in re.findall(r"`([\w/]+)`", cell)}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert on_the_page - {"benchmarks"} == folders | modules
