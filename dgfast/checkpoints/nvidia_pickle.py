"""Network snapshots of NVIDIA's EDM (`network-snapshot-*.pkl`), read as data.

Such a pickle brings the source text of its modules along, and may name any function. Here neither is run: the machine
of `pickle_machine` knows the ten globals below, and each stands for a function of this file that checks its arguments.
Sizes are held against the bytes that are there before anything is allocated.
"""

import inspect
import io
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgfast import denoiser, nets
from dgfast.checkpoints import one_line
from dgfast.checkpoints.pickle_machine import Global, Machine, RefusedError, of, require
from dgfast.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """A network of a snapshot: `nets.build(kind, **keywords)` takes the state dict `tensors`."""

    kind: str
    keywords: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class PersistentObject:
    """An object of EDM's persistence mechanism, or a torch module, as data: the name of its class and its attributes.

    Attributes:
        state: its `__dict__`; the constructor's arguments lie under `_init_args` and `_init_kwargs`.
    """

    class_name: str
    state: dict[str, Any]


# What a hostile or torn program can make the machine, or a network's constructor, stumble over.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read(path: Path) -> Snapshot:
    """The network under the key `ema`.

    Raises:
        UserError: not such a snapshot, one that asks for anything beyond what a snapshot needs, a broken file, a
            network that dgfast does not know.
    """
    try:
        with path.open("rb") as stream:
            content = Machine(_GLOBALS, build=_build).run(stream)
        snapshot = _snapshot(content)
        _check_size(snapshot, path.stat().st_size)
        return snapshot
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _MALFORMED as error:
        what = str(error) if isinstance(error, RefusedError) else f"broken pickle, {type(error).__name__}: {error}"
        raise UserError(
            f"{path} is no network snapshot of EDM: {one_line(what)}; nothing in it was run. Give a .pkl that "
            "NVIDIA's EDM code wrote, or the weights as .safetensors"
        ) from error


# What the globals of a snapshot stand for -----------------------------------------------------------------------------
@dataclass(frozen=True)
class _Storage:
    values: Tensor  # 1-D


@dataclass(frozen=True)
class _NumberType:
    format: str  # as in `struct`


def _persistent_object(meta: Any) -> PersistentObject:
    require(of(meta, dict).get("type") == "class", "a persistent object in it is not a class")
    return PersistentObject(of(meta["class_name"], str), of(meta["state"], dict))


def _module_dict() -> PersistentObject:
    return PersistentObject("ModuleDict", {})


def _ordered_dict() -> dict[str, Any]:
    return {}


def _set(items: Any) -> set[str]:
    return {of(item, str) for item in of(items, list)}


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, meta: Any = None
) -> Tensor:
    """A view of the storage. Strides of 0 could blow a small storage up, so it has no more elements than that."""
    values = of(storage, _Storage).values
    dimensions = len(of(size, tuple))
    numbers = [offset, *size, *of(stride, tuple)]
    valid = dimensions == len(stride) <= 8 and all(of(number, int) >= 0 for number in numbers)
    require(valid, "a tensor in it has no valid shape")
    count, last = math.prod(size), offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = count <= len(values) and (last < len(values) if count else offset <= len(values))
    require(inside, "a tensor in it reaches beyond its storage")
    return values.as_strided(size, stride, offset)


def _parameter(data: Any, requires_grad: Any = False, hooks: Any = None) -> Tensor:
    return of(data, Tensor)


def _storage(blob: Any) -> _Storage:
    """The storage in a `torch.save` file of the old format: five pickles and a count before the bytes."""
    stream = io.BytesIO(of(blob, bytes))
    machine = Machine(_DTYPES, persistent=lambda identity: of(identity, tuple))
    magic, version, system, identity, keys = (machine.run(stream) for _ in range(5))
    known = (magic, version) == (0x1950A86A20F9469CFC6C, 1001) and of(system, dict).get("little_endian") is True
    require(known, "a storage in it is not in torch.save's little-endian format")
    what, kind, key, _, count, view = of(identity, tuple)
    dtype = of(kind, Global).meaning
    (stored,) = struct.unpack("<q", stream.read(8))
    raw = bytearray(stream.read())
    whole = (what, keys, view, stored) == ("storage", [key], None, count) and len(raw) == stored * dtype.itemsize
    require(whole, "a storage in it is not whole")
    return _Storage(torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype))


def _number_type(code: Any, align: Any = False, copy: Any = False) -> _NumberType:
    return _NumberType({"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}[of(code, str)])


def _number(kind: Any, raw: Any) -> Any:
    (value,) = struct.unpack(of(kind, _NumberType).format, of(raw, bytes))
    return value


def _build(target: Any, state: Any) -> None:
    if isinstance(target, PersistentObject):
        target.state.update(of(state, dict))
    else:  # a number type, which numpy gives its byte order like this
        of(target, _NumberType)
        require(of(state, tuple)[1] in ("<", "|"), "a number in it is not little-endian")


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): _ordered_dict,
    ("builtins", "set"): _set,
    ("numpy", "dtype"): _number_type,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}
_DTYPES: dict[tuple[str, str], torch.dtype] = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
}


# From the objects to the network --------------------------------------------------------------------------------------
def _snapshot(content: Any) -> Snapshot:
    require(isinstance(content, dict) and "ema" in content, "it has no network under 'ema'")
    net = of(content["ema"], PersistentObject)
    kinds = denoiser.PRECONDITIONERS
    require(net.class_name in kinds, f"its network is {net.class_name[:80]!r}, not one of {', '.join(kinds)}")
    require(net.state.get("_init_args", ()) == (), "its network was made with positional arguments")
    parameters = inspect.signature(kinds[net.class_name]).parameters
    keywords = {}
    for name, value in of(net.state["_init_kwargs"], dict).items():
        unbounded = value is not None and name in parameters and parameters[name].default == math.inf
        if name == "use_fp16" or (unbounded and of(value, float, int) == math.inf):
            continue  # how the official code would run it, and a default that JSON cannot hold
        keywords[name] = _plain(name, value)
    raw = of(net.state["_modules"]["model"], PersistentObject).class_name
    require(keywords.setdefault("model_type", raw) == raw, f"its model is {raw[:80]!r}, not what model_type says")
    return Snapshot(net.class_name, keywords, dict(_walk(net, "", set())))


def _plain(name: Any, value: Any) -> Any:
    """A number, a word or a flat list of them: shared nested lists could hold more items than there are atoms."""
    items = list(value) if type(value) in (list, tuple) else [value]
    plain = all(type(item) in (type(None), bool, int, float, str) for item in items)
    finite = all(math.isfinite(item) for item in items if type(item) is float)
    require(plain and finite, f"its constructor argument {name!r:.80} is not a number, a word or a list of them")
    return items if type(value) in (list, tuple) else value


def _walk(module: PersistentObject, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as `state_dict` has them. A module that returns could make the walk endless."""
    require(id(module) not in seen, f"its module {prefix:.80} stands at two places")
    seen.add(id(module))
    temporary = of(module.state.get("_non_persistent_buffers_set", set()), set)
    for group in ("_parameters", "_buffers", "_modules"):
        for name, value in of(module.state.get(group, {}), dict).items():
            proper = len(of(name, str)) <= 80 and name.isprintable()
            require(proper, "it has a tensor or a module without a proper name")
            if value is None or (group == "_buffers" and name in temporary):
                continue
            if group == "_modules":
                yield from _walk(of(value, PersistentObject), f"{prefix}{name}.", seen)
            else:
                yield f"{prefix}{name}", of(value, Tensor)


def _check_size(snapshot: Snapshot, file_size: int) -> None:
    """Refuse keywords of a network larger than the file, before anyone builds it.

    Its raw network is laid out without memory. It has nearly all of the weights under any preconditioner, and EDM's
    is the one that computes nothing when it is made.
    """
    keywords, own = snapshot.keywords, inspect.signature(denoiser.PRECONDITIONERS[snapshot.kind]).parameters
    shared = {"img_resolution", "img_channels", "label_dim"}
    numbers = [n for value in keywords.values() for n in (value if isinstance(value, list) else [value])]
    blocks = of(keywords.get("num_blocks", 1), int) * len(of(keywords.get("channel_mult", [1]), list))
    small = blocks <= len(snapshot.tensors) and all(abs(n) <= file_size for n in numbers if type(n) is int)
    too_large = f"its network would be larger than its {file_size:,} bytes"
    require(small, too_large)
    try:
        with torch.device("meta"):
            raw = nets.build("EDMPrecond", **{n: v for n, v in keywords.items() if n in shared or n not in own})
    except _MALFORMED as error:
        raise RefusedError(f"its constructor arguments make no {snapshot.kind}: {error}") from error
    require(sum(value.numel() for value in raw.state_dict().values()) <= file_size, too_large)
