"""Several packages compiled side by side, a process each: most of the time PyTorch's compiler uses one core.

python -m dgfast.runtimes.package.beside FOLDER compiles the program that `compile_all` left in that folder.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.fx import GraphModule

from dgfast import ops
from dgfast.devices import arithmetic, precision
from dgfast.runtimes.package.file import compile, exported, settings

_POLL = 0.1  # seconds
_PROGRAM, _SETTINGS, _PACKAGE = "program.pt2", "settings.json", "package.pt2"


def compile_all(graphs: Sequence[tuple[GraphModule, Sequence[Tensor | None], Path]]) -> None:
    """Compile each graph for its example to its file, without weights, where there are the cores for it.

    One that fails leaves no file: whoever needs it compiles it in the usual way, which says why.
    """
    cores = os.cpu_count() or 1
    at_once = min(len(graphs), cores // 2)
    if at_once < 2:
        return
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(cores // at_once)} | os.environ
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)  # also when the user has stopped this one
        made: list[tuple[Path, Path]] = []
        for graph, example, path in graphs:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".writing-", dir=path.parent)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of its own code
                torch.export.save(exported(graph, example), folder / _PROGRAM)
            (folder / _SETTINGS).write_text(json.dumps([arithmetic()["products"], settings(example, None)]))
            while sum(process.poll() is None for process in processes) == at_once:
                time.sleep(_POLL)
            command = [sys.executable, "-m", __name__, str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
            made.append((folder / _PACKAGE, path))
        for process, (package, path) in zip(processes, made, strict=True):
            if process.wait() == 0:
                package.replace(path)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _compile(folder: Path) -> None:
    with suppress(ImportError):  # no Triton, then the program has none of its kernels
        for name in ops.KERNELS:
            ops.register(name)
    rounding, told = json.loads((folder / _SETTINGS).read_text())
    with precision(rounding):
        compile(lambda: torch.export.load(folder / _PROGRAM), told, folder / _PACKAGE)


if __name__ == "__main__":
    _compile(Path(sys.argv[1]))
