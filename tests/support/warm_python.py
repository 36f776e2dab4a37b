"""A Python that has imported torch already, for commands that come one after another: each would take seconds for it.

What stands in for `python` is a script that hands over its arguments, folder, variables and open files, and ends as the
command ends. Each command is a fork: nothing that one did is there for the next.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

_IMPORTED = ("torch", "torch._dynamo", "torch.export")  # what all extras need; a page may lack any other package
_POLL = 0.02  # seconds
_STAND_IN = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
server.sendall(said)
code = int(server.recv(8) or b"1")
sys.exit(code if code >= 0 else 128 - code)
"""


@cache
def warm_python() -> Path:
    """The script that stands in for `python` while this process lives."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # what is forked must not have had threads
    )  # fmt: skip
    atexit.register(process.communicate)
    assert process.stdout is not None
    return Path(process.stdout.readline().decode().strip())


def run(*arguments: str, folder: Path, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments in that folder. variables: those of this process, if none are given."""
    command = [str(warm_python()), *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


class _Command(NamedTuple):
    """Of `python`, after its name; where, with which variables, and its standard input, output and error."""

    arguments: list[str]
    folder: str
    variables: dict[str, str]
    files: list[int]

    def run(self) -> None:
        """As this process, which then ends as any does."""
        for standard, file in enumerate(self.files):
            os.dup2(file, standard)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.variables)
        sys.orig_argv[:] = ["python", *self.arguments]
        kind, rest = self.arguments[0], self.arguments[1:]
        sys.argv[:] = [kind, *rest] if kind == "-c" or not kind.startswith("-") else rest
        first = self.folder if kind.startswith("-") else str(Path(kind).resolve().parent)
        sys.path[:1] = [first, *filter(None, self.variables.get("PYTHONPATH", "").split(os.pathsep))]
        sys.modules.pop("sitecustomize", None)
        with suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(sys.argv.pop(1), {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")


def _next_command(server: socket.socket) -> _Command | None:
    """In a fork for each command that command; in the process itself None, once nobody can send any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who attend
    while server in select.select([server, sys.stdin], [], [])[0]:
        connection, _ = server.accept()
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _attended(connection)
        connection.close()
    return None


def _attended(connection: socket.socket) -> _Command:
    """The command that a stand-in sends, in a fork that its sender is told the exit code of."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        arguments, folder, variables = json.loads(stream.read(int.from_bytes(length, "big")))
    child = os.fork()
    if not child:
        connection.close()
        return _Command(arguments, folder, variables, files)
    for file in files:
        os.close(file)
    done, status = 0, 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and select.select([connection], [], [], _POLL)[0]:  # its sender was killed
            os.kill(child, signal.SIGKILL)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a fork that ends would otherwise look at every object, a second's work
    folder = tempfile.mkdtemp()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/socket")
    server.listen()
    script = Path(folder, "python")
    script.write_text(_STAND_IN.format(python=sys.executable, address=f"{folder}/socket"))
    script.chmod(0o755)
    print(script, flush=True)
    command = _next_command(server)
    if command is None:
        shutil.rmtree(folder)
    else:
        command.run()


if __name__ == "__main__":
    _main()
