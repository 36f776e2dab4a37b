"""Who calls an operation: the module in whose forward it runs, and the line of somebody's source."""

import linecache
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch import nn

CALLED = {"torch", *sys.stdlib_module_names}
"""Packages whose code runs on somebody's behalf."""


@contextmanager
def modules_entered() -> Iterator[list[nn.Module]]:
    """The modules in whose forward the program is, outermost first, at every moment inside of `with`."""
    entered: list[nn.Module] = []
    enter = nn.modules.module.register_module_forward_pre_hook(lambda module, _: entered.append(module))
    leave = nn.modules.module.register_module_forward_hook(lambda *_: _leave(entered), always_call=True)
    try:
        yield entered
    finally:
        enter.remove()
        leave.remove()


def _leave(entered: list[nn.Module]) -> None:
    entered.pop()


def named(entered: list[nn.Module]) -> str:
    """The innermost of these modules by its name in the outermost, and its class; "" for none."""
    if not entered:
        return ""
    names = {module: name for name, module in entered[0].named_modules()}
    name, kind = names.get(entered[-1], ""), type(entered[-1]).__name__
    return f"{type(entered[0]).__name__}{'.' if name else ''}{name} ({kind})"


def source_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The innermost line that is neither torch's, Python's nor dgfast's, as "file.py:12: code"; "" if there is none.

    Args:
        frames: outermost first, each with the number of its line: see `traceback.walk_tb`.
    """
    found = ""
    for frame, number in frames:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in CALLED | {"dgfast"}:
            file = frame.f_code.co_filename
            code = linecache.getline(file, number, frame.f_globals).strip()
            found = f"{Path(file).name}:{number}" + (f": {code}" if code else "")
    return found
