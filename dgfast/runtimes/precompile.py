"""Helper processes that compile regions into inductor's cache, from which this process then loads them.

Inductor compiles one function at a time, and half of that time is Python's, half the C++ compiler's, so that other
cores stand idle. Threads are no way out: fake tensors and inductor keep state that is one a process. What a helper does
not finish, for whatever reason, is compiled here; helpers change nothing but the time.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dgfast.runtimes.regions import Region

_MOST = 3  # helpers; each holds some 300 MB

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Helpers:
    """One process for each core but this one's, from the first need of them to the end of the `with` block."""

    def __init__(self) -> None:
        self._wanted = min(torch.get_num_threads() - 1, _MOST)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._known = _Known()

    def __enter__(self) -> "Helpers":
        if self._known.nothing():  # a new cache: while this process traces, the helpers precompile torch's C++ headers
            self._start()
        return self

    def share(self, regions: dict[str, Region]) -> list[str]:
        """Give away a share of those that are not in the cache yet, and return the others; the keys are their kinds."""
        new = [kind for kind in regions if kind not in self._known]
        if len(new) > 1:
            self._start()
        places = len(self._processes) + 1
        for i, process in enumerate(self._processes, 1):
            _send(process, [regions[kind] for kind in new[i::places]])
        given = {kind for i in range(1, places) for kind in new[i::places]}
        return [kind for kind in regions if kind not in given]

    def wait(self, kinds: Sequence[str]) -> None:
        """Until the helpers have done their share; remember that all of these kinds are in the cache."""
        for process in self._processes:
            process.wait()
        self._processes = []
        self._known.add(kinds)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            _close(process)

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])  # so that it finds dgfast however this process found it
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        while len(self._processes) < self._wanted:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dgfast.runtimes.precompile"],
                    env=os.environ | {"PYTHONPATH": paths},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )


class _Known:
    """The kinds of region that this version of torch has compiled into inductor's cache, as empty files beside it."""

    def __init__(self) -> None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        self._folder = Path(cache_dir()) / "dgfast"

    def nothing(self) -> bool:
        return not self._folder.exists()

    def __contains__(self, kind: str) -> bool:
        return self._file(kind).exists()

    def add(self, kinds: Sequence[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            self._file(kind).touch()

    def _file(self, kind: str) -> Path:
        return self._folder / sha256(f"{torch.__version__} {kind}".encode()).hexdigest()


def _send(process: "subprocess.Popen[bytes]", regions: Sequence[Region]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died; what it was to do is done here
        pickle.dump([(graph, [_shape(x) for x in example]) for graph, example in regions], process.stdin)
    _close(process)


def _close(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def _shape(x: Tensor) -> Shape:
    return tuple(x.shape), tuple(x.stride()), x.dtype


def main() -> None:
    """Precompile the headers, then compile what comes in by standard input, from the process that started this one."""
    torch._inductor.compile(torch.fx.symbolic_trace(lambda x: (x.sin(),)), [torch.zeros(64)])
    for graph, shapes in pickle.load(sys.stdin.buffer):
        example: list[Any] = [torch.empty_strided(size, stride, dtype=dtype) for size, stride, dtype in shapes]
        torch._inductor.compile(graph, example)


if __name__ == "__main__":
    main()
