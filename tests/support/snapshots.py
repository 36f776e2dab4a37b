"""Pickles as NVIDIA's EDM writes its networks, without its code."""

import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import nn


class Persistent:
    """Is pickled as EDM's persistent objects are."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta: dict[str, Any] = {"type": "class", "version": 6, "module_src": "1 / 0"}
        self.meta |= {"class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(net: nn.Module, **keywords: Any) -> Any:
    """The network as a tree of such objects, with plain torch containers in between."""
    children: dict[str, Any] = {name: child and persistent(child) for name, child in net._modules.items()}
    if isinstance(net, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = children
        return container
    own = {name: dict(getattr(net, name)) for name in ("_parameters", "_buffers")}
    temporary = {"_non_persistent_buffers_set": set(net._non_persistent_buffers_set)}
    arguments = {"_init_args": (), "_init_kwargs": keywords}
    return Persistent(type(net).__name__, own | temporary | arguments | {"_modules": children})


def pickled(content: Any) -> bytes:
    """The pickle of an object, in which persistent objects name EDM's module."""
    module = ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("a reader called it")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module.__dict__["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    with patch.dict(sys.modules, {"torch_utils": ModuleType("torch_utils"), module.__name__: module}):
        return pickle.dumps(content, protocol=4)
