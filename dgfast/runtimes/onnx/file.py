"""ONNX files on disk: one, and a second for weights that do not fit into it."""

import tempfile
from pathlib import Path
from typing import Any

LIMIT = 2**31 - 2**24
"""Most bytes of weights in a file: protobuf's 2 GB, less some room for what is not weights."""


def save(model: Any, path: Path) -> None:
    """Write an `onnx.ModelProto`; weights beyond 2 GB go to a second file beside it, and are gone from `model`.

    What lay there before stays if this fails, and no file ever stands beside the weights of another.
    """
    import onnx

    data = data_of(path)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LIMIT
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        new = Path(folder, path.name)
        onnx.save(model, str(new), save_as_external_data=large, all_tensors_to_one_file=True, location=data.name)
        remove(path)
        if large:
            data_of(new).chmod(new.stat().st_mode)  # onnx lets the owner alone read it
            data_of(new).replace(data)
        new.replace(path)


def data_of(path: Path) -> Path:
    """Where the weights of an ONNX file are that do not fit into it."""
    return path.with_name(f"{path.name}.data")


def files_of(path: Path) -> list[Path]:
    """The file, and the one of its weights if there is one."""
    return [file for file in (path, data_of(path)) if file.is_file()]


def remove(path: Path) -> None:
    """The file, then the one of its weights."""
    for file in (path, data_of(path)):
        file.unlink(missing_ok=True)
