"""A name for all that the trace of a function depends on: two traces with one name are the same trace.

The function is written down by Python's own pickle, which nobody ever reads: values as they are, code by its name, and
tensors apart, with their contents, for a trace may read them. Code has to be dgfast's, torch's, numpy's or Python's
own, for which the hash of dgfast's sources and the versions in `environment` stand. A closure, or whatever else pickle
cannot write down, has no name.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial, partialmethod
from hashlib import sha256
from io import BytesIO
from pickle import Pickler
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dgfast.graph import Function

_TRUSTED = {"dgfast", "torch", "numpy", "typing_extensions", "pybind11_builtins", *sys.stdlib_module_names}


class NamelessError(Exception):
    """Something that a name cannot vouch for."""


def written(function: Function) -> tuple[bytes, list[Tensor]]:
    """The function and all that it consists of but the contents of tensors; and these, each once.

    Raises:
        NamelessError: it has a part that cannot be written down, or whose code is somebody else's.
    """
    file = BytesIO()
    pickler = _Pickler(file, protocol=5)
    try:
        pickler.dump(function)
    except Exception as error:  # every class has its own way to say that it cannot be pickled
        raise NamelessError(f"{error}") from error
    return file.getvalue(), [x for _, x in pickler.tensors.values()]


def digest(function: bytes, tensors: list[Tensor], *others: object) -> str:
    """The name of a function that `written` wrote down, and of other plain values."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = list(pool.map(_contents, tensors))
    return sha256(repr((function, contents, others)).encode()).hexdigest()


class _Pickler(Pickler):
    """Writes down what a function consists of.

    Attributes:
        tensors: those it met, each with its place in the order of meeting, by their ids.
    """

    def __init__(self, file: BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, value: Any) -> Any:
        """What stands for a value; None: what pickle makes of it."""
        if type(value) is str:
            return value.encode()  # pickle writes a text that it has met otherwise than one equal to it
        if type(value) in (set, frozenset):  # whose order is another in every process
            return type(value).__name__, sorted(value)
        return self._form(value) if isinstance(value, Tensor) else None

    def reducer_override(self, value: Any) -> Any:
        """How a value that is neither plain nor a collection is written."""
        require_trusted(value)
        if isinstance(value, MethodType):
            return partial, (value.__func__, value.__self__)  # pickle looks at the function's name alone
        if isinstance(value, nn.Module):
            return type(value), (), vars(value)  # pickle leaves out what `compile` made of it
        if isinstance(value, type):
            for member in (member for base in value.__mro__ for member in vars(base).values()):
                require_untouched(member)
        return NotImplemented

    def _form(self, x: Tensor) -> tuple[object, ...]:
        unlike = x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_conj() or x.is_neg()
        if unlike or type(x) not in (Tensor, nn.Parameter):
            raise NamelessError(f"a {type(x).__qualname__} of layout {x.layout} on {x.device}")
        index, _ = self.tensors.setdefault(id(x), (len(self.tensors), x))
        form = tuple(x.shape), x.stride(), str(x.dtype), str(x.device), x.requires_grad
        return type(x).__name__, index, *form


def require_untouched(value: Any) -> None:
    """Raise NamelessError if somebody has put their own under a name of dgfast or torch, where this stands."""
    require_trusted(inside(value))
    if isinstance(value, partial | partialmethod):
        raise NamelessError("a partial in the place of a function")


def require_trusted(value: Any) -> None:
    """Raise NamelessError for code, or an object with code, for which neither a hash nor a version stands."""
    if isinstance(value, FunctionType):  # it may say that it is what it wraps
        homes = value.__module__, value.__globals__.get("__name__")
    elif isinstance(value, ModuleType):
        homes = value.__name__, "builtins"
    else:
        homes = type(value).__module__, getattr(value, "__module__", None) or "builtins"
    if not all(str(home).partition(".")[0] in _TRUSTED for home in homes):
        raise NamelessError(f"code of {' and '.join(map(str, homes))}")


def inside(value: Any) -> Any:
    """The function in a property, or in a class method or static one."""
    return getattr(value, "fget", getattr(value, "__func__", value))


def _contents(x: Tensor) -> str:
    dense = x.detach().cpu().contiguous()
    return sha256(dense.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
