"""Network snapshots of NVIDIA's EDM and EDM2 (`network-snapshot-*.pkl`, `edm2-*.pkl`), read as data.

Such a pickle brings the source text of its modules along, and may name any function. Here neither is run: the machine
of `pickle_machine` knows the globals below, and each stands for a function that checks its arguments. Sizes are
held against the bytes that are there before anything is allocated.
"""

import inspect
import io
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dgfast import bounds, denoiser, weights
from dgfast.checkpoints import one_line, torch_file
from dgfast.checkpoints.pickle_machine import Machine
from dgfast.checkpoints.pickle_values import MALFORMED, Budget, Global, RefusedError, of, require
from dgfast.errors import UserError
from dgfast.latents import VaeSpec

_EDM2 = "EDM2Precond"
_KINDS = {kind: kind for kind in denoiser.PRECONDITIONERS if kind != _EDM2} | {"Precond": _EDM2}
"""Our kinds of network, by the names of the official classes."""
_MOST_CHANNELS = 64  # of latents


@dataclass(frozen=True)
class Snapshot:
    """A network of a snapshot: `nets.build(kind, **keywords)` takes the state dict `tensors`.

    Attributes:
        encoder: the class of what made its images of pixels, "" where the file names none.
        vae: what decodes its images, where they are latents.
    """

    kind: str
    keywords: dict[str, Any]
    tensors: dict[str, Tensor]
    encoder: str = ""
    vae: VaeSpec | None = None


@dataclass(frozen=True)
class PersistentObject:
    """An object of EDM's persistence mechanism, or a torch module, as data: the name of its class and its attributes.

    Attributes:
        state: its `__dict__`; the constructor's arguments lie under `_init_args` and `_init_kwargs`.
    """

    class_name: str
    state: dict[str, Any]


def read(path: Path) -> Snapshot:
    """The network under the key `ema`.

    Raises:
        UserError: not such a snapshot, one that asks for anything beyond what a snapshot needs, a broken file, a
            network that dgfast does not know.
    """
    with bounds.open_file(path) as stream:
        try:
            budget = Budget(path.stat().st_size)
            content = Machine(_globals(budget), budget, build=partial(_build, budget)).run(stream)
            snapshot = _snapshot(content, budget)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except MALFORMED as error:
            what = str(error) if isinstance(error, RefusedError) else f"broken pickle, {type(error).__name__}: {error}"
            raise UserError(
                f"{path} is no network snapshot of EDM or EDM2: {one_line(what)}; nothing in it was run. Give a .pkl "
                "that NVIDIA's code wrote, or the weights as .safetensors"
            ) from error
    weights.check(snapshot.kind, snapshot.keywords, snapshot.tensors, path)
    return snapshot


# What the globals of a snapshot stand for -----------------------------------------------------------------------------
@dataclass(frozen=True)
class _NumberType:
    format: str  # as in `struct`


@dataclass
class _Array:
    """An array of numpy's, of one dimension."""

    values: tuple[float, ...] = ()


class _ArrayType:
    """Stands for numpy.ndarray, which nothing here makes an object of."""


def _persistent_object(meta: Any) -> PersistentObject:
    require(of(meta, dict).get("type") == "class", "a persistent object in it is not a class")
    return PersistentObject(of(meta["class_name"], str), of(meta["state"], dict))


def _module_dict() -> PersistentObject:
    return PersistentObject("ModuleDict", {})


def _ordered_dict() -> dict[str, Any]:
    return {}


def _set(budget: Budget, items: Any) -> set[str]:
    budget.pay(steps=len(of(items, list)))
    return {of(item, str) for item in items}


def _storage(budget: Budget, blob: Any) -> torch_file.Storage:
    """The storage in a file of torch.save's older format."""
    return of(torch_file.read_legacy(io.BytesIO(of(blob, bytes)), budget), torch_file.Storage)


def _number_type(code: Any, align: Any = False, copy: Any = False) -> _NumberType:
    return _NumberType({"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}[of(code, str)])


def _number(kind: Any, raw: Any) -> Any:
    (value,) = struct.unpack(of(kind, _NumberType).format, of(raw, bytes))
    return value


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    require(of(kind, Global).meaning is _ArrayType, "it has an array of another kind than numpy's")
    return _Array()


def _values(state: Any) -> tuple[float, ...]:
    """What numpy gives an array as its state: version, shape, type, order, bytes."""
    _, shape, kind, _, raw = of(state, tuple)
    require(len(of(shape, tuple)) == 1 and 0 < of(shape[0], int) <= _MOST_CHANNELS, "it has an array of no short list")
    layout = of(kind, _NumberType).format
    return struct.unpack(f"{layout[0]}{shape[0]}{layout[1:]}", of(raw, bytes))


def _build(budget: Budget, target: Any, state: Any) -> None:
    if isinstance(target, _Array):
        target.values = _values(state)
    elif isinstance(target, PersistentObject):
        budget.pay(steps=len(of(state, dict)))
        target.state.update(state)
    else:  # a number type, which numpy gives its byte order like this
        of(target, _NumberType)
        require(of(state, tuple)[1] in ("<", "|"), "a number in it is not little-endian")


def _globals(budget: Budget) -> dict[tuple[str, str], Callable[..., Any]]:
    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
        ("torch.nn.modules.container", "ModuleDict"): _module_dict,
        ("torch._utils", "_rebuild_tensor_v2"): torch_file.tensor,
        ("torch._utils", "_rebuild_parameter"): torch_file.parameter,
        ("torch.storage", "_load_from_bytes"): partial(_storage, budget),
        ("collections", "OrderedDict"): _ordered_dict,
        ("builtins", "set"): partial(_set, budget),
        ("dnnlib.util", "EasyDict"): _ordered_dict,
        ("numpy", "dtype"): _number_type,
        ("numpy", "ndarray"): _ArrayType,
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy.core.multiarray", "scalar"): _number,
        ("numpy._core.multiarray", "scalar"): _number,
    }


# From the objects to the network --------------------------------------------------------------------------------------
def _snapshot(content: Any, budget: Budget) -> Snapshot:
    require(isinstance(content, dict) and "ema" in content, "it has no network under 'ema'")
    net = of(content["ema"], PersistentObject)
    require(net.class_name in _KINDS, f"its network is {net.class_name[:80]!r}, not one of {', '.join(_KINDS)}")
    kind = _KINDS[net.class_name]
    require(net.state.get("_init_args", ()) == (), "its network was made with positional arguments")
    parameters = inspect.signature(denoiser.PRECONDITIONERS[kind]).parameters
    keywords = {}
    for name, value in of(net.state["_init_kwargs"], dict).items():
        unbounded = value is not None and name in parameters and parameters[name].default == math.inf
        if name == "use_fp16" or (unbounded and of(value, float, int) == math.inf):
            continue  # how the official code would run it, and a default that JSON cannot hold
        keywords[name] = _plain(of(name, str), value)
    if kind == _EDM2:
        encoder, vae = _encoder(content.get("encoder"))
        return Snapshot(kind, keywords, dict(_walk(net, "", set(), budget)), encoder, vae)
    raw = of(net.state["_modules"]["model"], PersistentObject).class_name
    require(keywords.setdefault("model_type", raw) == raw, f"its model is {raw[:80]!r}, not what model_type says")
    return Snapshot(kind, keywords, dict(_walk(net, "", set(), budget)))


def _encoder(encoder: Any) -> tuple[str, VaeSpec | None]:
    """The class of a snapshot's encoder, and what decodes its latents; nothing of a file that has none."""
    if encoder is None:
        return "", None
    name = of(encoder, PersistentObject).class_name
    if name == "StandardRGBEncoder":
        return name, None
    require(name == "StabilityVAEEncoder", f"its encoder is {name[:80]!r}, neither StandardRGBEncoder nor a VAE")
    scale, bias = (of(encoder.state[key], _Array).values for key in ("scale", "bias"))
    return name, VaeSpec(of(encoder.state["vae_name"], str), scale, bias, "unit")


def _plain(name: str, value: Any) -> Any:
    """The argument as JSON can hold it."""
    few = type(value) not in (list, tuple) or len(value) <= bounds.KEYWORD_LIST
    value = list(value) if few and type(value) is tuple else value
    try:
        bounds.check_keywords({name: value})
    except ValueError as error:
        raise RefusedError(f"its constructor argument {error}") from error
    return value


def _walk(module: PersistentObject, prefix: str, seen: set[int], budget: Budget) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as `state_dict` has them. A module that returns could make the walk endless."""
    require(id(module) not in seen, f"its module {prefix:.80} stands at two places")
    seen.add(id(module))
    temporary = of(module.state.get("_non_persistent_buffers_set", set()), set)
    for group in ("_parameters", "_buffers", "_modules"):
        entries = of(module.state.get(group, {}), dict)
        budget.pay(steps=len(entries))  # a million modules may share one long dict
        for name, value in entries.items():
            proper = len(of(name, str)) <= 80 and name.isprintable()
            require(proper, "it has a tensor or a module without a proper name")
            if value is None or (group == "_buffers" and name in temporary):
                continue
            if group == "_modules":
                yield from _walk(of(value, PersistentObject), f"{prefix}{name}.", seen, budget)
            else:
                require(of(value, Tensor).is_floating_point(), "it has a tensor that is not of floats")
                budget.pay(text=len(prefix) + len(name))
                yield f"{prefix}{name}", value
