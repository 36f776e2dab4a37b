"""Mean and covariance of features in files of others: EDM's `fid-refs/*.npz`, EDM2's `dataset-refs/*.pkl`.

The pickle's program is run by `pickle_machine`, as data: a dict of metrics, each a dict of arrays `mu` and `sigma`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgfast import bounds
from dgfast.checkpoints.pickle_machine import Machine
from dgfast.checkpoints.pickle_values import MALFORMED, Budget, Global, RefusedError, of, require
from dgfast.errors import UserError, one_line

MOST_WIDTH = 16_384
"""Numbers of a feature; a covariance of more takes 2 GB and longer than anybody waits."""

_ROWS = 256  # at once, so that no second matrix lies in memory
_ROUNDING = 1e-3
"""Of a covariance in float16, relative to its largest variance."""
_LARGEST = 1e100
"""Squares of it are far from float64's end."""

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]
"""Mean [D] and covariance [D, D], float64, by the name of their metric."""


def read_pickle(path: Path) -> Statistics:
    """
    Raises:
        UserError: a broken file, or one that asks for anything beyond what statistics need.
    """
    with bounds.open_file(path) as stream:
        try:
            content = Machine(_GLOBALS, Budget(path.stat().st_size), _build).run(stream)
            found = {
                of(name, str): {key: value.array() for key, value in entry.items() if isinstance(value, _Array)}
                for name, entry in of(content, dict).items()
                if isinstance(entry, dict) and {"mu", "sigma"} <= entry.keys()
            }
            require(bool(found), "it has no metric with mu and sigma")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except MALFORMED as error:
            what = str(error) if isinstance(error, RefusedError) else f"broken pickle, {type(error).__name__}: {error}"
            raise UserError(
                f"{path} is no file of statistics as EDM2 writes them: {one_line(what)}; nothing in it was run"
            ) from error
    return {name: check(path, entry.get("mu"), entry.get("sigma"), name) for name, entry in found.items()}


def check(
    path: Path, mean: np.ndarray | None, covariance: np.ndarray | None, name: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as float64, if they can be a mean and a covariance."""
    what = f"{path}: {name + ': ' if name else ''}mu [D] and sigma [D, D] must be finite numbers"
    if mean is None or covariance is None:
        raise UserError(f"{what}; they are no arrays")
    width = len(mean) if mean.ndim == 1 else 0
    if not 0 < width <= MOST_WIDTH or covariance.shape != (width, width):
        raise UserError(f"{what}, D at most {MOST_WIDTH:,}; found {list(mean.shape)} and {list(covariance.shape)}")
    if not all(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in (mean, covariance)):
        raise UserError(f"{what}; found {mean.dtype}, {covariance.dtype}, or others than finite ones")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if reason := _no_covariance(covariance):
        raise UserError(f"{path}: {name + ': ' if name else ''}sigma is no covariance: {reason}")
    if np.abs(mean).max() > _LARGEST or np.abs(covariance).max() > _LARGEST:
        raise UserError(f"{path}: {name + ': ' if name else ''}mu or sigma has numbers beyond {_LARGEST:g}")
    return mean, covariance


def _no_covariance(values: np.ndarray) -> str:
    """Why a matrix [D, D] can't be one, as far as its numbers one by one tell; nothing where it can."""
    variances = values.diagonal()
    if not (variances >= 0).all() or not variances.any():
        return "its diagonal has negative numbers, or zeros alone"
    rounding, deviations = _ROUNDING * variances.max(), np.sqrt(variances)
    for start in range(0, len(values), _ROWS):
        rows, columns = values[start : start + _ROWS], values[:, start : start + _ROWS]
        if np.abs(rows - columns.T).max() > rounding:
            return "it is not symmetric"
        if (np.abs(rows) > np.outer(deviations[start : start + _ROWS], deviations) + rounding).any():
            return "a number in it is larger than the variances beside it allow"
    return ""


# What the globals of such a pickle stand for --------------------------------------------------------------------------
@dataclass(frozen=True)
class _NumberType:
    name: str  # as numpy has it


@dataclass
class _Array:
    """An array of numpy's; its content comes with its state."""

    shape: tuple[int, ...] = ()
    kind: _NumberType | None = None
    raw: Any = b""
    by_columns: bool = False

    def array(self) -> np.ndarray:
        require(
            self.kind is not None and len(self.shape) <= 2, "it has an array without content, or of more dimensions"
        )
        assert self.kind is not None
        dtype = np.dtype(self.kind.name)
        size = math.prod(of(side, int) for side in self.shape) * dtype.itemsize
        require(type(self.raw) in (bytes, bytearray) and min(self.shape, default=1) > 0, "it has an empty array")
        require(len(self.raw) == size, "an array in it has not the size that it claims")
        return np.frombuffer(self.raw, dtype).reshape(self.shape, order="F" if self.by_columns else "C")


class _ArrayType:
    """Stands for numpy.ndarray, which nothing here makes an object of."""


def _number_type(code: Any, align: Any = False, copy: Any = False) -> _NumberType:
    names = {"f8": "<f8", "f4": "<f4", "i8": "<i8", "i4": "<i4", "b1": "?"}
    require(
        type(code) is str and code.lstrip("<") in names, "it has an array of other numbers than floats and integers"
    )
    return _NumberType(names[code.lstrip("<")])


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    require(of(kind, Global).meaning is _ArrayType, "it has an array of another kind than numpy's")
    return _Array()


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    return _Array(of(shape, tuple), of(kind, _NumberType), raw, of(order, str) == "F")


def _number(kind: Any, raw: Any) -> None:
    """A single number, such as that of the images, which nobody asks for."""
    of(kind, _NumberType)


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Array):
        _, shape, kind, by_columns, raw = of(state, tuple)
        target.shape, target.kind, target.raw = of(shape, tuple), of(kind, _NumberType), raw
        target.by_columns = of(by_columns, bool)
    else:  # a number type, which numpy gives its byte order like this
        of(target, _NumberType)
        require(of(state, tuple)[1] in ("<", "|"), "a number in it is not little-endian")


_GLOBALS = {
    ("numpy", "dtype"): _number_type,
    ("numpy", "ndarray"): _ArrayType,
    **{
        (f"numpy.{core}.{module}", name): meaning
        for core in ("core", "_core")
        for module, name, meaning in (
            ("multiarray", "_reconstruct", _array),
            ("multiarray", "scalar", _number),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
