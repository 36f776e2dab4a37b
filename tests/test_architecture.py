"""Who may import whom inside dgfast, read from the source."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "dgfast"
MODULES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py"), *(PACKAGE / "export").glob("*.py")})
HEAVY = {"mlxtend", "torchmetrics", "prdc", "matplotlib", "onnx", "onnxruntime", "tensorrt", "triton", "diffusers"}
# Room -> the rooms it may import (its own besides), and the packages beyond the standard library.
ROOMS = {
    "errors": (set(), {"click"}),
    "bounds": ({"errors"}, set()),
    "config": ({"errors"}, set()),
    "noise_levels": ({"config", "errors"}, {"torch"}),
    "randomness": ({"errors"}, {"torch"}),
    "kernels": (set(), {"torch", "triton"}),
    "extras": ({"errors"}, set()),
    "ops": ({"errors", "extras", "kernels"}, {"torch"}),
    "solvers": ({"noise_levels", "ops"}, {"torch"}),
    "denoiser": ({"noise_levels"}, {"torch"}),
    "nets": ({"denoiser", "errors", "ops"}, {"torch", "numpy"}),
    "guidance": ({"errors", "noise_levels", "ops"}, {"torch"}),
    "runtimes": ({"bounds", "devices", "errors", "extras"}, {"torch", "numpy", "onnx", "onnxruntime"}),
    "engines": ({"bundle", "config", "errors", "guidance"}, {"torch"}),
    "outputs": ({"errors"}, {"torch", "numpy", "PIL"}),
    "plan": ({"config", "errors", "guidance", "nets", "networks", "noise_levels"}, {"torch"}),
    "options": ({"__version__", "bounds", "config"}, {"click"}),
    "one_step": ({"bundle", "devices", "errors", "networks", "plan", "randomness", "sampler"}, {"torch"}),
    "batches": ({"one_step", "outputs", "plan", "sampler"}, {"torch", "numpy"}),
}


def imports(path: Path, whole_file: bool = True) -> Iterator[str]:
    """Full names of what a module imports; without `whole_file`, only what runs when it is imported itself."""
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
        if whole_file or not (function or typing_only):
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


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_architecture_package_needs_neither_its_tools_nor_heavy_packages(path: Path) -> None:
    """What is slow to import or not always installed is imported inside the function that needs it."""
    first_names = {name.split(".")[0] for name in imports(path)}
    assert not first_names & {"tests", "benchmarks", "export"}
    inside = path.is_relative_to(PACKAGE / "export")
    assert inside or not any(name.startswith("dgfast.export") for name in imports(path)), "not for importing"
    kernel = path.is_relative_to(PACKAGE / "kernels")
    assert not {name.split(".")[0] for name in imports(path, whole_file=False)} & (
        HEAVY - {"triton"} if kernel else HEAVY
    )
    ours = {name for name in imports(path) if name.startswith("dgfast.kernels")}
    assert kernel or path.name == "ops.py" or not ours, "only ops.py chooses kernels"


def test_architecture_package_works_without_heavy_packages() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(HEAVY)}))  # None: importing it raises ImportError
import dgfast
assert "torch" not in sys.modules, "import dgfast takes as long as torch"
import dgfast.ops, dgfast.nets, dgfast.sampler, dgfast.runtimes.compiled
assert "torch._dynamo" not in sys.modules, "torch's compiler takes as long to import as torch"
for name in ("load", "OneStep", "Sampler", "Networks", "SamplingConfig", "GuidanceConfig"):
    assert name in dgfast.__all__ and getattr(dgfast, name).__name__ == name
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
