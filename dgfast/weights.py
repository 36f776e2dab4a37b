"""Weights in safetensors files, and the networks that they fit.

What a file says of itself is held against its bytes before anything is allocated, and what keywords ask for against the
weights: a network is laid out without memory first, and built only if the weights are all of its tensors.
"""

import itertools
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from dgfast import bounds, nets
from dgfast.checkpoints import one_line
from dgfast.denoiser import Preconditioner
from dgfast.errors import UserError

_ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MOST_AXES, _LONGEST_NAME = 8, 300
UNBUILDABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What keywords of the wrong kind make the constructor of a network stumble over."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: no such file, not a whole safetensors file, or a tensor that no network has.
    """
    with bounds.open_file(path) as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = path.stat().st_size - 8
            if length > size:
                raise ValueError("it is cut short")
            for name, entry in bounds.parse_json(bounds.read_text(stream, length)).items():
                if name != "__metadata__":
                    _check_entry(name, entry, size - length)
            return load_file(path)
        except (OSError, SafetensorError, struct.error, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({one_line(error)})") from error


def _check_entry(name: str, entry: Mapping[str, Any], size: int) -> None:
    """
    Raises:
        ValueError: a tensor of another kind than networks have, or that its bytes are not enough for.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    whole = len(shape) <= _MOST_AXES and all(type(number) is int for number in (*shape, begin, end))
    if not whole or entry["dtype"] not in _ITEM_SIZES or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"{name!r:.80} is no tensor that networks have")
    if not all(extent > 0 for extent in shape):
        raise ValueError(f"{name} has the shape {shape}; no network has a tensor without elements")
    if not 0 <= begin <= end <= size or end - begin != math.prod(shape) * _ITEM_SIZES[entry["dtype"]]:
        raise ValueError(f"{name} of the shape {shape} has not so many bytes")


def build(kind: str, keywords: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """`nets.build(kind, **keywords)` with the weights `tensors`, which are all of its state dict.

    Raises:
        UserError: as `check`, before anything is allocated.
    """
    check(kind, keywords, tensors, source)
    net = nets.build(kind, **keywords)
    net.load_state_dict(dict(tensors))
    return net


def check(kind: str, keywords: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> None:
    """Lay the network out without memory, and compare it with `tensors`.

    Raises:
        UserError: keywords that make no such network, or one of other tensors: what is missing, superfluous or
            misshapen in `source`, by name. Tensors that are views of the same few bytes.
    """
    try:
        bounds.check_keywords(keywords)
        nets.check_types(kind, keywords)
        with (
            warnings.catch_warnings(), torch.device("meta"), _WithoutValues(),
            _at_most(len(tensors) + bounds.MISSING_TENSORS),
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # torch's, of sizes of 0
            state = nets.build(kind, **keywords).state_dict()
    except UNBUILDABLE as error:
        raise UserError(f"{source}: its keywords make no {one_line(kind, 80)} ({one_line(error)})") from error
    _check_fit(state, tensors, source)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * sum(storages.values()):
        raise UserError(f"{source}: its tensors are views of the same few bytes; save them as tensors of their own")


def placed(net: nn.Module, device: torch.device | str, dtype: torch.dtype) -> Any:  # the kind names the class
    """The net ready for sampling: frozen, in eval mode, folded, channels-last.

    Weights become `dtype`; buffers (frequencies, noise tables, filters) stay float32, where they must, and so do the
    weights of layers that say `keeps_float32`.
    """
    net.eval().requires_grad_(False)
    if isinstance(net, Preconditioner):
        net.fold()
    for module in net.modules():
        if not getattr(module, "keeps_float32", False):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_state(net: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy `tensors` into `net`, all of them and nothing else.

    Raises:
        UserError: what is missing, superfluous or misshapen in `source`, by name.
    """
    _check_fit(net.state_dict(), tensors, source)
    net.load_state_dict(dict(tensors))


def _check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    complaints = [
        *_listed("missing", [name for name in wanted if name not in tensors]),
        *_listed("superfluous", [name for name in tensors if name not in wanted]),
        *_listed(
            "misshapen",
            [
                f"{name} {list(tensors[name].shape)}, not {list(value.shape)}"
                for name, value in wanted.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
    ]
    if complaints:
        raise UserError(f"{source} does not fit its network: {'; '.join(complaints)}")


def _listed(what: str, names: list[str], most: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what} {', '.join(one_line(name) for name in names[:most])}{more}"]


class _WithoutValues(TorchFunctionMode):
    """Draws no weights: tensors without memory have no values, and for drawing them torch imports its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = [*args, *(kwargs or {}).values()]
        return drawn[0] if func in (Tensor.normal_, nn.init.normal_) else func(*args, **(kwargs or {}))


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop whatever makes a network here once it has more parameters: a million layers without memory take memory.

    Raises:
        ValueError: it has.
    """
    thread, count = threading.get_ident(), itertools.count(1)

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread and next(count) > parameters:
            raise ValueError("it would have far more tensors than its weights")

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()
