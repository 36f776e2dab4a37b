"""The C++ of this folder, put together for the processor that it will run on."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent

ELEMENTARY = (_FOLDER / "elementary.h").read_text()
"""Functions of one number that generated and handwritten code call."""


def lanes() -> int:
    """Floats in a vector register. Code for another number is right everywhere, and slower."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def source(name: str, *needed: str, **constants: int) -> str:
    """The code of `name`.h behind `needed`, the matrix products and constants; it exports one function `run`."""
    named = {"LANES": lanes(), "MOST_ROWS": 14 if lanes() == 16 else 6} | constants
    first = "".join(f"enum {{ {key} = {value} }};\n" for key, value in named.items())
    texts = ((_FOLDER / f"{part}.h").read_text() for part in ("products", *needed, name))
    return "".join([ELEMENTARY, first, *texts])
