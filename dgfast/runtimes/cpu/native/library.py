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

from dgfast.errors import UserError
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
        UserError: there is no compiler, it fails, or the folder cannot be written to.
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
                    function = _open(path)
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
    done = subprocess.run([command, *_FLAGS, str(source), "-o", str(built)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        raise UserError(f"{command} failed: {reason}; run without --compile, or with --compile=try")
    return built


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
    return subprocess.run([command, "--version"], capture_output=True, text=True).stdout


@cache
def _processor() -> str:
    """What -march=native depends on."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines[:40] if line.startswith(("model name", "flags")))])
