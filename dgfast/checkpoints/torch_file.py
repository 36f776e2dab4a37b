"""Files of torch.save, of the zip format and of the older one, read as data: nothing in them is run.

Only what makes dense tensors has a meaning here. Whatever else a file names (`argparse.Namespace`, `torch.device`, a
trainer's classes, an optimizer) becomes an `Opaque`: nothing is imported, and what a file does with it is ignored.
Sizes are held against the bytes that are there before anything is allocated.
"""

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dgfast import bounds
from dgfast.checkpoints import one_line, stored_zip
from dgfast.checkpoints.pickle_machine import Machine
from dgfast.checkpoints.pickle_values import MALFORMED, Budget, Global, RefusedError, any_key, of, require
from dgfast.checkpoints.pickle_values import Opaque as Opaque
from dgfast.errors import UserError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_AXES = 8


def read(path: Path) -> object:
    """What was saved, as plain data.

    Returns:
        dicts (for an OrderedDict too), lists, tuples, sets, numbers, text, bytes, None, dense tensors on the CPU (for a
        parameter too), and an `Opaque` for all else. Tensors share memory where those that were saved did.

    Raises:
        UserError: unreadable, broken, not from torch.save, or a file that asks for more than `bounds` allows or for
            something that runs code.
    """
    with bounds.open_file(path) as stream:
        try:
            budget = Budget(path.stat().st_size)
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            return _read_zip(stream, budget) if zipped else read_legacy(stream, budget)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except MALFORMED as error:
            reason = str(error) if isinstance(error, RefusedError) else f"{type(error).__name__}, {error}"
            raise UserError(
                f"{path} is not a file of tensors: {one_line(reason)}; nothing in it was run. "
                "Give a state dict as torch.save writes it, or the weights as .safetensors"
            ) from error


# The two formats ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, slots=True)
class Storage(Opaque):
    """Bytes that tensors are views of.

    Attributes:
        raw: uint8 [bytes]. dtype: of its elements; uint8 where every tensor says its own.
    """

    raw: Tensor
    dtype: torch.dtype


def _read_zip(stream: IO[bytes], budget: Budget) -> Any:
    members = stored_zip.members(stream)
    programs = [name for name in members if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
    require(len(programs) == 1, "it is a zip file, but has not one data.pkl as torch.save's have")
    folder = programs[0].removesuffix(b"data.pkl")
    if folder + b"constants.pkl" in members:
        raise RefusedError("it is a program (TorchScript); save net.state_dict() of the network it was made from")
    order = members.get(folder + b"byteorder")
    if order is not None:
        little = order.size == 6 and stored_zip.read(stream, order).numpy().tobytes() == b"little"
        require(little, "it was not written on a little-endian machine")
    require(members[programs[0]].size <= bounds.PICKLE_BYTES, "its data.pkl is larger than that of any checkpoint")
    program = io.BytesIO(stored_zip.read(stream, members[programs[0]]).numpy().data)

    def load(name: str, count: int, size: int) -> Tensor:
        member = members[folder + b"data/" + name.encode()]
        require(member.size == size, f"its storage {name!r:.80} has {member.size:,} bytes where {size:,} are announced")
        return stored_zip.read(stream, member)

    return _machine(budget, load).run(program)


def read_legacy(stream: IO[bytes], budget: Budget) -> Any:
    """What was saved in the format before torch 1.6: five pickles, then the length and the bytes of each storage.

    Raises:
        RefusedError: something in it that torch.save does not write. Any of `MALFORMED`: a broken file.
    """
    waiting: dict[str, tuple[int, memoryview]] = {}

    def reserve(name: str, count: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        waiting[name] = count, raw.numpy().data
        return raw

    machine = _machine(budget, reserve)
    magic, version, system, content, names = (machine.run(stream) for _ in range(5))
    known = (of(magic, int), of(version, int)) == (_MAGIC, _VERSION) and of(system, dict).get("little_endian") is True
    require(known, "it is not in torch.save's little-endian format")
    for name in of(names, list):
        count, buffer = waiting.pop(of(name, str))
        announced = stream.read(8) == struct.pack("<q", count)
        whole = announced and stream.readinto(buffer) == len(buffer)  # type: ignore[attr-defined]
        require(whole, "a storage in it is not whole")
    require(not waiting and not stream.read(1), "its storages are not those that it announces")
    return content


def _machine(budget: Budget, load: Callable[[str, int, int], Tensor]) -> Machine:
    """A machine whose persistent ids are storages; `load` gives the bytes of one by its name, elements and size."""
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Opaque:
        what, *rest = of(identity, tuple)
        if of(what, str) == "module":  # a class and its source text
            return of(rest[0], Opaque)
        require(what == "storage", "it has a persistent id that torch.save does not write")
        kind, name, _, count, *part = rest
        require(part in ([], [None]), "a storage in it is a part of another, as before torch 0.4")
        if type(kind) is Opaque:  # of a quantised tensor
            return kind
        dtype = of(of(kind, Global).meaning, torch.dtype)
        size = of(count, int) * dtype.itemsize
        if of(name, str) not in storages:
            require(size >= 0, "a storage in it has no valid size")
            budget.pay(data=size)
            storages[name] = Storage("a storage", load(name, count, size), dtype)
        same = storages[name]
        require(same.dtype == dtype and same.raw.nbytes == size, "a storage in it is of two types")
        return same

    return Machine(_meanings(budget), budget, _ignore_state, storage, _unknown)


def _ignore_state(target: Any, state: Any) -> None:
    of(target, dict, Global)  # `state_dict` gives its OrderedDict an attribute


def _unknown(module: str, name: str) -> Opaque:
    full = repr(f"{module}.{name}"[:80])[1:-1]
    require(
        module.partition(".")[0] not in _HOSTILE_MODULES and (module, name) not in _HOSTILE,
        f"it asks for the global {full!r}, which runs whatever the file says",
    )
    return Opaque(full)


# What the globals of a file stand for ---------------------------------------------------------------------------------
def tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, meta: Any = None
) -> Tensor | Opaque:
    """A view of the storage; an `Opaque` if it repeats values, conjugates or negates them.

    Raises:
        RefusedError: no valid shape, or one that reaches beyond the storage.
    """
    if type(storage) is Opaque:
        return storage
    return _view(of(storage, Storage), storage.dtype, offset, size, stride, meta)


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, meta: Any = None
) -> Tensor | Opaque:
    if type(dtype) is Opaque:  # of a newer torch
        return dtype
    return _view(of(storage, Storage), of(of(dtype, Global).meaning, torch.dtype), offset, size, stride, meta)


def _view(storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any, meta: Any) -> Tensor | Opaque:
    valid = len(of(size, tuple)) == len(of(stride, tuple)) <= _MOST_AXES
    require(valid and all(of(n, int) >= 0 for n in (offset, *size, *stride)), "a tensor in it has no valid shape")
    values = storage.raw.view(dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = offset <= len(values) if 0 in size else last < len(values)
    require(inside, "a tensor in it reaches beyond its storage")
    if meta or math.prod(size) > len(values):
        return Opaque("a tensor that is not dense")
    return values.as_strided(size, stride, offset)


def parameter(data: Any, requires_grad: Any = False, hooks: Any = None) -> Tensor | Opaque:
    """The tensor of a parameter."""
    return of(data, Tensor, Opaque)  # type: ignore[return-value]


def _parameter_with_state(data: Any, requires_grad: Any, hooks: Any, state: Any) -> Tensor | Opaque:
    return parameter(data)


def _dict(budget: Budget, items: Any = ()) -> dict[Any, Any]:
    budget.pay(steps=len(of(items, list, tuple)))
    return {any_key(name): value for name, value in items}


def _default_dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _set(budget: Budget, items: Any = ()) -> set[Any]:
    budget.pay(steps=len(of(items, list, tuple)))
    return set(map(any_key, items))


def _sizes(sizes: Any = ()) -> tuple[Any, ...]:
    return of(sizes, tuple)


def _bytes(budget: Budget, text: Any, encoding: Any) -> bytes:
    budget.pay(text=len(of(text, str)))
    require(of(encoding, str) == "latin1", "it has bytes in an unknown encoding")
    return of(text, str).encode("latin1")


def _meanings(budget: Budget) -> dict[tuple[str, str], Any]:
    return {
        **_DTYPES,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_state,
        ("torch", "Size"): _sizes,
        ("collections", "OrderedDict"): partial(_dict, budget),
        ("collections", "defaultdict"): _default_dict,
        **{(module, name): partial(_set, budget) for module in _BUILTINS for name in ("set", "frozenset")},
        ("_codecs", "encode"): partial(_bytes, budget),
    }


_BUILTINS = ("builtins", "__builtin__")  # the second is Python 2's, which protocol 2 keeps
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_NEWER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_DTYPES: dict[tuple[str, str], torch.dtype] = {
    **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _STORAGES.values()},
    **{("torch", name): getattr(torch, name) for name in _NEWER},
}
# What pickles name that mean harm. They would do none here, but whoever gets such a file should know.
_HOSTILE_MODULES = {"ctypes", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys"}
_HOSTILE = {(module, name) for module in _BUILTINS for name in ("eval", "exec", "compile", "open", "__import__")}
