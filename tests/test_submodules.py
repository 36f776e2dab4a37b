"""What is reached through a package's submodules is there although nobody else has imported them.

`import torch` brings many submodules and leaves others out: `torch.utils._triton.has_triton()` works wherever torch's
compiler was imported before, as in these tests, and fails in a user's process.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Sources that import the same share a process, which has imported nothing but the package and what they import.
_RESOLVE = """
import importlib, json, os, sys

def is_there(chain):
    name, *rest = chain.split(".")
    value = sys.modules[name]
    for attribute in rest:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True

importlib.import_module(sys.argv[1])
for statements, chains_of in json.load(sys.stdin):
    if not os.fork():
        exec("\\n".join(statements), {})
        for source, chains in chains_of.items():
            for chain in chains:
                if not is_there(chain):
                    print(source, chain, flush=True)
        os._exit(0)
    if os.wait()[1]:
        print(*chains_of, "fails to import", flush=True)
"""


def of_package(package: str, source: str) -> tuple[list[str], list[str]]:
    """The statements with which a source imports from a package, and the names that it reaches through modules."""
    statements, chains, full = list[str](), set[str](), dict[str, str]()
    nodes = [*ast.walk(ast.parse(source))]
    for node in nodes:
        if isinstance(node, ast.Import):
            here = {alias.asname or package: alias.name if alias.asname else package for alias in node.names}
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            roots = {str(node.module).split(".")[0]}
        else:
            continue
        if package in roots:
            statements.append(ast.unparse(node))
            full |= here
    for node in nodes:
        first, *rest = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if first in full and all(name.isidentifier() for name in rest):
            chains.add(".".join([full[first], *rest]))
    longest = {chain for chain in chains if not any(other.startswith(f"{chain}.") for other in chains)}
    # What torch imports when it is asked for comes last: it brings half of the others.
    return statements, sorted(longest, key=lambda chain: (chain.split(".")[1].startswith("_"), chain))


def together(asked: dict[str, tuple[list[str], list[str]]]) -> list[tuple[list[str], dict[str, list[str]]]]:
    """The sources that have the same statements: these once, and the names of each source.

    A private name may be what torch imports when it is asked for. Whoever has one shares with its equals alone.
    """
    groups = dict[str, tuple[list[str], dict[str, list[str]]]]()
    for source, (statements, chains) in asked.items():
        if statements:
            lazy = [chain for chain in chains if "._" in chain]
            groups.setdefault(json.dumps([sorted(statements), lazy]), (statements, {}))[1][source] = chains
    return [*groups.values()]


def unreachable(package: str, sources: dict[str, str]) -> list[str]:
    """A line for each name that a source reaches only after somebody else has imported it."""
    asked = json.dumps(together({name: of_package(package, source) for name, source in sources.items()}))
    done = subprocess.run(
        [sys.executable, "-c", _RESOLVE, package], input=asked, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("package", ["torch", "onnx", "triton"])
def test_submodules_are_imported_where_they_are_used(package: str) -> None:
    folders = (ROOT / name for name in ("dgfast", "export", "kernels", "benchmarks"))
    paths: list[Path] = [path for folder in folders for path in folder.rglob("*.py")]
    assert unreachable(package, {str(path.relative_to(ROOT)): path.read_text() for path in paths}) == []


def test_submodules_that_nobody_imported_are_noticed() -> None:
    sources = {
        "lazy": "import torch\ntorch._dynamo.reset()\ntorch.utils._triton.has_triton()",
        "crash": "import torch\ndef runs(): return torch.utils._triton.has_triton()",
        "same": "import torch\ntorch.nn.Module, torch.utils._triton.has_triton()",
        "mended": "from torch.utils._triton import has_triton\ndef runs(): return has_triton()",
        "alias": "from torch import utils as u\nu._triton.has_triton()",
        "gone": "def runs(): from torch.utils._triton import no_such_name",
    }
    assert unreachable("torch", sources) == [
        "lazy torch.utils._triton.has_triton",
        "crash torch.utils._triton.has_triton",
        "same torch.utils._triton.has_triton",
        "alias torch.utils._triton.has_triton",
        "gone fails to import",
    ]
