"""The environment that a page's commands run in: one that they make themselves, or one that only looks like it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from tests.support.warm_python import warm_python

_TREE = ("benchmarks", "dgfast", "docs", "examples", "export", "kernels", "tests")
_FILES = ("LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")
_STARTUP = """
import os, sys
for name in filter(None, os.environ.get("PAGES_WITHOUT", "").split(",")):
    sys.modules[name] = None  # importing it fails, as if it were not installed
"""


class Shell:
    """A fresh copy of the checkout and an empty home, in which commands run one after the other, as in one terminal.

    Args:
        folder: where to put both. stand_in: let `.venv` be the running environment with only those packages visible
            that the page has installed; otherwise the page's own commands make it.
    """

    def __init__(self, folder: Path, *, stand_in: bool) -> None:
        self.copy, self.home, self._state = folder / "dgfast", folder / "home", folder / "state.sh"
        self._stand_in, self._extras = stand_in, set[str]()
        ignored = shutil.ignore_patterns("__pycache__")
        for name in _TREE:
            shutil.copytree(ROOT / name, self.copy / name, symlinks=True, ignore=ignored)
        for name in _FILES:
            shutil.copy(ROOT / name, self.copy / name)
        self.home.mkdir()
        self._state.touch()
        self._variables = self._start(folder)

    def run(self, command: str, seconds: float | None = None) -> tuple[int | None, str]:
        """The exit status of a command, and what it printed; None if it was ended after so many seconds."""
        if self._stand_in and command.startswith("pip install"):
            return self._install(command)
        without = ",".join(sorted(_invisible(frozenset(self._extras)))) if self._stand_in else ""
        script = (
            f'set -a; . {self._state}; cd "$PWD"; PAGES_WITHOUT={without}\n'
            f"{command}\nstatus=$?; export -p > {self._state}; exit $status"
        )
        with subprocess.Popen(
            ["bash", "-c", script], cwd=self.copy, env=self._variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(timeout=seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # bash, and whatever it started
                if isinstance(error, subprocess.TimeoutExpired):
                    return None, ""
                raise
        return process.returncode, printed

    def _start(self, folder: Path) -> dict[str, str]:
        """The variables of a new terminal, in which the running environment is not active."""
        own = str(Path(sys.executable).parent)
        path = [entry for entry in os.environ["PATH"].split(os.pathsep) if entry != own]
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "OMP_", "LC_", "LANG"))}
        variables = kept | {"PATH": os.pathsep.join(path), "HOME": str(self.home)}
        if not self._stand_in:
            return variables
        (folder / "startup").mkdir()
        (folder / "startup" / "sitecustomize.py").write_text(_STARTUP)
        _pretend_environment(self.copy / ".venv")
        variables["OMP_NUM_THREADS"] = "1"  # other tests run beside this
        if "DGFAST_CACHE_DIR" in os.environ:  # which have compiled the same libraries
            variables["DGFAST_CACHE_DIR"] = os.environ["DGFAST_CACHE_DIR"]
        return variables | {"PYTHONPATH": f"{folder / 'startup'}{os.pathsep}{self.copy}"}

    def _install(self, command: str) -> tuple[int, str]:
        """Make the packages of `pip install -e '.[extra,...]'` visible."""
        asked = re.fullmatch(r"pip install -e '\.\[([\w,-]+)\]'", command)
        extras = set(asked[1].split(",")) if asked else set[str]()
        if not extras or extras - _extras().keys():
            return 1, f"only extras of this package can be installed here: {', '.join(_extras())}"
        self._extras |= extras
        return 0, ""


def _pretend_environment(venv: Path) -> None:
    """The running virtual environment under another name, so that the Makefile has nothing to install."""
    running = Path(sys.prefix)
    assert (running / "pyvenv.cfg").is_file(), "run this in a virtual environment"
    (venv / "bin").mkdir(parents=True)
    for entry in (running / "bin").iterdir():
        if entry.name not in ("activate", "dgfast", "pytest", "python", "python3"):
            (venv / "bin" / entry.name).symlink_to(entry)
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(warm_python())
    for name in ("lib", "pyvenv.cfg"):
        (venv / name).symlink_to(running / name)
    (venv / "bin" / "activate").write_text(f'PATH="{venv / "bin"}:$PATH"\n')
    for name, module in (("dgfast", "dgfast.__main__"), ("pytest", "pytest")):
        script = venv / "bin" / name
        script.write_text(f"#!{venv / 'bin' / 'python'}\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n")
        script.chmod(0o755)
    for name in (".installed", ".installed-test"):
        (venv / name).touch()


def _extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"] | {"": project["dependencies"]}


@cache
def _invisible(extras: frozenset[str]) -> set[str]:
    """Modules that some extra would install, and neither dgfast itself nor any of these extras."""
    optional = {canonicalize_name(Requirement(line).name) for lines in _extras().values() for line in lines}
    plugins = {canonicalize_name(entry.dist.name) for entry in entry_points(group="pytest11") if entry.dist}
    visible = _reachable([f"dgfast[{extra}]" for extra in ("", *extras)]) | {"dgfast"} | plugins  # pytest loads them
    hidden = optional - visible
    return {
        module
        for module, distributions in packages_distributions().items()
        if all(canonicalize_name(name) in hidden for name in distributions)
    }


def _reachable(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that these requirements bring, with whatever they require in turn."""
    names, waiting, extras = set[str](), list(requirements), _extras()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "dgfast":
            waiting += [line for extra in requirement.extras or ("",) for line in extras[extra]]
        elif name not in names:
            names.add(name)
            try:
                further = [Requirement(line) for line in requires(name) or ()]
            except PackageNotFoundError:
                continue
            asked = [{"extra": extra} for extra in ("", *requirement.extras)]
            waiting += [
                str(line).partition(";")[0]
                for line in further
                if line.marker is None or any(line.marker.evaluate(extra) for extra in asked)
            ]
    return names
