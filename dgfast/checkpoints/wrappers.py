"""Which tensors of a checkpoint are the network's: training scripts keep them under keys and names of their own.

A checkpoint is a tree whose branches are dicts, or first words of tensors' names: `{"model": {"net.a": tensor}}` has
the parts `model` and `model.net`. Averaged weights go before the others, because everyone samples from them.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgfast.checkpoints import one_line
from dgfast.checkpoints.torch_file import Opaque
from dgfast.errors import UserError

_WEIGHTS = ("state_dict", "model", "net")  # Lightning's; DiT's and most others'; EDM's, of its training
_WRAPPERS = ("module", "_orig_mod")  # words that DistributedDataParallel and torch.compile put into names
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEEPEST = 8  # parts within parts: what a hostile file holds may hold itself

Entries = dict[str, object]


@dataclass(frozen=True)
class StateDict:
    """The tensors of one network, under its own names.

    Attributes:
        part: where in the file they lie, "" for the whole of it. beside: the parts that it was chosen from.
        taken_off: words in the names that were not the network's own.
        left_out: entries that are no weights, such as counters.
    """

    tensors: dict[str, Tensor]
    part: str = ""
    beside: tuple[str, ...] = ()
    taken_off: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def unwrap(content: object, key: str | None, source: object) -> StateDict:
    """The network's tensors in what a checkpoint holds.

    Args:
        content: plain data, as `torch_file.read` returns it.
        key: the part to take, such as "model" or "state_dict.net"; None: the averaged weights, else the only ones.

    Raises:
        UserError: no such part, several that may be meant, or something else than dense tensors by name.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source} holds a {_kind(content)}, not a state dict: save net.state_dict()")
    part, beside, entries = "", tuple[str, ...](), _entries(content)
    if key is not None:
        part, entries = key, _at(entries, key, source)
    for _ in range(_DEEPEST):
        branches = _branches(entries)
        choice = _choice(entries, branches, source)
        if choice is None:
            return _averaged(_flat(entries, branches, part, source), beside, source)
        beside = tuple(_joined(part, name) for name in branches if name != choice) or beside
        part, entries = _joined(part, choice), _entries(entries[choice])
    raise UserError(f"{source} holds parts within parts, {one_line(part)} and deeper: save net.state_dict()")


# Branches that are dicts ----------------------------------------------------------------------------------------------
def _entries(content: object) -> Entries:
    """What a dict has by name: an optimizer's state, by numbers, is none of it."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str)}


def _at(entries: Entries, key: str, source: object) -> Entries:
    """The entries of a part: a dict under that key, or the tensors whose names begin so."""
    if key in entries:
        inner = _entries(entries[key])
        if not inner:
            raise UserError(f"{source}: its part {key!r} is of type {_kind(entries[key])}, not tensors by name")
        return inner
    below = {name[len(key) + 1 :]: value for name, value in entries.items() if name.startswith(f"{key}.")}
    if below:
        return below
    for dot in re.finditer(r"\.", key):
        inner = _entries(entries.get(key[: dot.start()]))
        if inner:
            return _at(inner, key[dot.end() :], source)
    names = [*_branches(entries), *_first_words(entries)]
    raise UserError(f"{source} has no part {key!r}; it has {one_line(', '.join(names)) or 'none'}")


def _branches(entries: Entries) -> list[str]:
    """The parts that hold weights by name, or parts that do. Each dict is looked at once, however often it is named."""
    direct: dict[int, bool] = {}

    def has_weights(part: object) -> bool:
        if isinstance(part, dict) and id(part) not in direct:
            direct[id(part)] = any(isinstance(name, str) and _is_weight(value) for name, value in part.items())
        return isinstance(part, dict) and direct[id(part)]

    parts = {id(value): value for value in entries.values() if isinstance(value, dict)}
    holding = {i for i, part in parts.items() if has_weights(part) or any(map(has_weights, part.values()))}
    return [name for name, value in entries.items() if id(value) in holding and name.isprintable()]


def _choice(entries: Entries, branches: Collection[str], source: object) -> str | None:
    """The part to go on with; None where the entries are the state dict."""
    _refuse_unreadable_average(entries, branches, source)
    candidates = [name for name in branches if _is_averaged(name)]
    candidates = candidates or [name for name in _WEIGHTS if name in branches][:1]
    if not candidates and not any(map(_is_weight, entries.values())):
        candidates = list(branches)
    if len(candidates) > 1:
        raise UserError(f"{source} has the parts {one_line(', '.join(candidates))}: choose one with --key")
    return candidates[0] if candidates else None


def _refuse_unreadable_average(entries: Entries, branches: Collection[str], source: object) -> None:
    """Other weights must not take the place of averaged ones that are there, but in a form without names."""
    averaged = {id(value): name for name, value in entries.items() if _is_averaged(name) and name not in branches}
    for name in averaged.values():
        value = entries[name]
        inner = value.values() if isinstance(value, dict) else [value]
        lists = [item for v in inner if isinstance(v, list | tuple) for item in v[:1]]
        if any(isinstance(v, Opaque) for v in inner) or any(isinstance(item, Tensor) for item in lists):
            raise UserError(
                f"{source}: its averaged weights, {one_line(name)!r}, are a {_kind(value)} and not tensors by name; "
                f"save their state dict, or take others with --key ({one_line(', '.join(branches)) or 'it has none'})"
            )


def _is_averaged(name: str) -> bool:
    return "ema" in re.findall(r"[a-z]+", name.lower())


# Branches that are words of names -------------------------------------------------------------------------------------
def _flat(entries: Entries, branches: Collection[str], part: str, source: object) -> StateDict:
    """The tensors of a state dict. What cannot be a weight is left out: counters, settings, an optimizer's state."""
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, value in entries.items():
        if isinstance(value, Tensor) and _is_weight(value) and name.isprintable():
            tensors[name] = value
        elif name in branches or (isinstance(value, Tensor) and value.numel() != 1):
            what = f"{name!r:.80} is not a dense tensor of floats"
            raise UserError(f"{source} is not a bare state dict: {what}. Save net.state_dict()")
        else:
            left_out.append(name)
    if not tensors:
        where = f"{source}, in its part {part}," if part else f"{source}"
        others = ", ".join(f"{name} ({_kind(entries[name])})" for name in left_out[:3])
        has = f", only {one_line(others)}" if others else ""
        raise UserError(f"{where} holds no tensors by name{has}: save net.state_dict()")
    return _without_prefix(StateDict(tensors, part, left_out=tuple(left_out)), source)


def _averaged(state: StateDict, beside: tuple[str, ...], source: object) -> StateDict:
    """The averaged weights, where those and others lie side by side, such as `ema.a` and `model.a`."""
    words = _first_words(state.tensors)
    averaged = [word for word in words if _is_averaged(word)]
    if not averaged or len(words) == 1:
        return replace(state, beside=beside)
    if len(averaged) > 1:
        raise UserError(f"{source} has the parts {one_line(', '.join(averaged))}: choose one with --key")
    start = f"{averaged[0]}."
    inner = {name.removeprefix(start): value for name, value in state.tensors.items() if name.startswith(start)}
    chosen = replace(state, tensors=inner, part=_joined(state.part, averaged[0]))
    return replace(_without_prefix(chosen, source), beside=tuple(word for word in words if word != averaged[0]))


def _without_prefix(state: StateDict, source: object) -> StateDict:
    """Its tensors without wrappers' words, and without any that all names begin with."""
    taken_off = [word for word in _WRAPPERS if any(word in name.split(".")[:-1] for name in state.tensors)]
    tensors: dict[str, Tensor] = {}
    for name, value in state.tensors.items():
        *words, last = name.split(".")
        own = ".".join([*(word for word in words if word not in _WRAPPERS), last])
        if own in tensors:
            raise UserError(f"{source} has {own} twice, if {' and '.join(taken_off)} is left out of names: give --key")
        tensors[own] = value
    for _ in range(_DEEPEST):
        shared = _first_words(tensors)
        if len(shared) > 1 or not all("." in name for name in tensors):
            break
        taken_off += shared
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    return replace(state, tensors=tensors, taken_off=(*state.taken_off, *taken_off))


def _first_words(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names if "." in name))


def _joined(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


# Values ---------------------------------------------------------------------------------------------------------------
def _is_weight(value: object) -> bool:
    """Whether it is a tensor of floats, and has any: no network has a tensor without, but a shape with 0 may lie."""
    return isinstance(value, Tensor) and value.dtype in _DTYPES and value.numel() > 0


def _kind(value: object) -> str:
    return value.name if isinstance(value, Opaque) else type(value).__name__
