"""Compiles C++ by the system's C++ compiler, once a machine: the results are kept in a folder.

A file is named by all that its contents depend on. A function is kept only if it was seen to compute what it should:
compilers err too.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dgfast.errors import UserError, one_line
from dgfast.graph.cache_folder import cache_folder

_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w")


def compiler() -> str:
    """The C++ compiler: the environment's CXX, or the first of those known.

    Raises:
        UserError: there is none.
    """
    for name in (os.environ.get("CXX"), *_COMPILERS):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise UserError(
        "--compile needs a C++ compiler, and there is none: install g++ (Debian, Ubuntu: apt install g++), "
        "or use --compile=try to run without compiling"
    )


def load(texts: Sequence[str], proves: Callable[[str, Any], bool]) -> dict[str, Any]:
    """The compiled functions of these codes; those that no run before has compiled are compiled now, in parallel.

    Args:
        proves: (code, function) -> whether the function computes what it should; asked once, before it is kept.

    Returns:
        the functions by their code. One that is not proved is missing.

    Raises:
        UserError: there is no compiler, it fails, the folder cannot be written to, or what is in it does not load.
    """
    folder, command = cache_folder("kernels"), compiler()
    paths = {text: folder / f"{_key(text, command)}.so" for text in texts}
    functions = {text: found for text, path in paths.items() if (found := _kept(path)) is not None}
    missing = [text for text in texts if text not in functions]
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as at, ThreadPoolExecutor(os.cpu_count()) as pool:
                built = list(pool.map(partial(_compile, command, Path(at)), range(len(missing)), missing))
                for text, path in zip(missing, built, strict=True):
                    function = _loaded(path)
                    if proves(text, function):
                        functions[text] = function
                        path.replace(paths[text])
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; set DGFAST_CACHE_DIR to a folder that can be written to"
        ) from error
    return functions


def _compile(command: str, folder: Path, number: int, text: str) -> Path:
    source, built = folder / f"{number}.cpp", folder / f"{number}.so"
    source.write_text(text)
    done = _run(command, *_FLAGS, str(source), "-o", str(built))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        raise UserError(f"{command} failed: {reason}; run without --compile, or with --compile=try")
    return built


def _run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"{command} does not start: {error.strerror}; set CXX to another, or run without --compile"
        ) from error


def _loaded(path: Path) -> Any:
    """The function in a file that was compiled just now."""
    try:
        return _open(path)
    except OSError as error:  # of the linker, which says more than a number and its text
        raise UserError(
            f"what was compiled does not load: {one_line(error)}; install the library if one is missing (libgomp1); if "
            "nothing may be executed in that folder, set DGFAST_CACHE_DIR to another; or run without --compile"
        ) from error


def _kept(path: Path) -> Any:
    """The function in that file; None if it is not there, or damaged."""
    try:
        return _open(path)
    except OSError:
        return None


@cache
def _open(path: Path) -> Any:
    function = ctypes.CDLL(str(path)).run
    function.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = None
    return function


def _key(text: str, command: str) -> str:
    return sha256("\n".join((text, *_FLAGS, _version(command), _processor())).encode()).hexdigest()


@cache
def _version(command: str) -> str:
    return _run(command, "--version").stdout


@cache
def _processor() -> str:
    """What -march=native depends on."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines[:40] if line.startswith(("model name", "flags")))])
