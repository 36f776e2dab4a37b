"""A name for all that the trace of a function depends on: two traces with one name are the same trace.

The name is a hash of the living objects: what a function closes over, the code of dgfast that it reaches and the
globals that this code names, networks attribute by attribute, and the contents of tensors, for a trace may read them.
Code that is not dgfast's, torch's or Python's own has no name, for nobody can say what it depends on.
"""

import functools
import os
import platform
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_OWN = "dgfast"
_TRUSTED = {"torch", "numpy", "click", *sys.stdlib_module_names}  # pinned by their versions, not by their code
_PLAIN = (
    types.NoneType, bool, int, float, complex, str, bytes, types.EllipsisType,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_FLOAT32 = ("generic", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv")
_BOOKKEEPING = {
    "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__match_args__", "__dataclass_fields__",
    "__dataclass_params__", "__abstractmethods__", "__parameters__", "__orig_bases__", "_abc_impl",
}  # fmt: skip  # of a class, and nothing that its methods do depends on it
_HEAP_TYPE = 1 << 9  # a class of Python: what its objects hold is in their attributes


class NamelessError(Exception):
    """Something that a name cannot vouch for."""


class Key:
    """A hash that takes in one object after another.

    Attributes:
        tensors: those it met, each once, in the order of meeting.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._hash = sha256()
        self._met: dict[Any, tuple[int, Any]] = {}  # with the object, so that its id stays its own

    def digest(self) -> str:
        """The hash of all that was added, contents of tensors included."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for contents in pool.map(_contents, self.tensors):
                self._note("contents", contents)
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Take in an object and all that it consists of.

        Raises:
            NamelessError: it has a part that is not dgfast's, torch's or Python's own, or of an unknown kind.
        """
        kind = type(value)
        if kind in _PLAIN:
            self._note(kind.__name__, repr(value))
        elif kind in (tuple, list, torch.Size):
            self._all(kind, value)
        elif kind in (dict, OrderedDict, types.MappingProxyType):
            self._all(kind, (part for item in value.items() for part in item))
        elif kind in (set, frozenset):
            self._note(kind.__name__, repr(sorted(map(_plain, value))))
        elif not self._is_known(id(value), value):
            self._object(value, kind)

    def _object(self, value: Any, kind: type) -> None:
        if kind in (Tensor, nn.Parameter):
            self._tensor(value)
        elif kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            self._parts("method", value.__func__, value.__self__)
        elif kind is functools.partial:
            self._parts("partial", value.func, value.args, value.keywords)
        elif kind is functools._lru_cache_wrapper:
            self._parts("cached", value.__wrapped__)
        elif kind in (staticmethod, classmethod):
            self._parts(kind.__name__, value.__func__)
        elif kind is property:
            self._parts("property", value.fget, value.fset)
        elif kind is ContextVar:
            self._parts("variable", value.name, value.get(None))
        elif isinstance(value, type) and not isinstance(value, types.GenericAlias):
            self._class(value)
        elif kind in (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType):
            self._builtin(value)
        elif kind in (torch._ops.OpOverload, torch._ops.OpOverloadPacket):
            self._note("operation", str(value))
        elif kind.__module__ == "typing" or kind is types.UnionType or isinstance(value, types.GenericAlias):
            self._note("hint", repr(value))
        else:
            self._instance(value, kind)

    def _note(self, kind: str, text: str) -> None:
        data = f"{kind} {text}".encode()
        self._hash.update(len(data).to_bytes(8, "little") + data)

    def _all(self, kind: type, values: Iterable[Any]) -> None:
        values = list(values)
        self._note(kind.__name__, str(len(values)))
        for value in values:
            self.add(value)

    def _parts(self, kind: str, *parts: Any) -> None:
        self._note("object", kind)
        for part in parts:
            self.add(part)

    def _is_known(self, key: Any, value: Any) -> bool:
        if key in self._met:
            self._note("again", str(self._met[key][0]))
            return True
        self._met[key] = len(self._met), value
        return False

    def _tensor(self, x: Tensor) -> None:
        if x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_conj() or x.is_neg():
            raise NamelessError(f"a tensor of layout {x.layout} on {x.device}")
        form = type(x).__name__, tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad
        self._note("tensor", repr(form))
        self.tensors.append(x)

    def _function(self, function: types.FunctionType) -> None:
        home = str(function.__globals__.get("__name__"))
        self._note("function", f"{home} {function.__module__} {function.__qualname__}")
        _require_trusted(home)
        if _root(home) != _OWN and _importable(function):
            return
        self._code(function.__code__)
        if function.__code__.co_filename == "<string>":  # what `dataclass` writes
            return
        self._parts("defaults", function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self._note("cell", "empty")
        if _root(home) == _OWN:
            self._globals(function.__globals__, set(_names(function.__code__)))

    def _code(self, code: types.CodeType) -> None:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, len(code.co_consts)
        self._note("code", repr((code.co_name, code.co_code, code.co_exceptiontable, names, counts)))
        for value in code.co_consts:
            if isinstance(value, types.CodeType):
                self._code(value)
            else:
                self.add(value)

    def _globals(self, namespace: dict[str, Any], names: set[str]) -> None:
        """What code that mentions these names may find under them."""
        found = sorted(names & namespace.keys())
        self._note("globals", repr(found))
        for value in map(namespace.__getitem__, found):
            if not isinstance(value, types.ModuleType):
                self.add(value)
            elif _root(value.__name__) != _OWN:
                self._outside(value, names)
            elif not self._is_known((id(value), frozenset(names)), value):
                self._globals(vars(value), names)

    def _outside(self, module: types.ModuleType, names: set[str]) -> None:
        """A module whose version stands for its code."""
        _require_trusted(module.__name__)
        self._note("module", module.__name__)
        _require_untouched(vars(module)[name] for name in names & vars(module).keys())

    def _class(self, cls: type) -> None:
        self._note("class", f"{cls.__module__} {cls.__qualname__}")
        _require_trusted(cls.__module__)
        if _root(cls.__module__) != _OWN:
            if not _importable(cls):
                raise NamelessError(f"a class that {cls.__module__} makes as it goes")
            _require_untouched(vars(cls).values())
            return
        self._all(tuple, cls.__bases__)
        self.add({name: value for name, value in vars(cls).items() if name not in _BOOKKEEPING})

    def _builtin(self, value: Any) -> None:
        owner = getattr(value, "__objclass__", None) or value.__self__
        self._note("builtin", value.__qualname__)
        if isinstance(owner, types.ModuleType):
            self._outside(owner, set())
        else:
            self.add(owner)

    def _instance(self, value: Any, cls: type) -> None:
        own_or_module = _root(cls.__module__) == _OWN or isinstance(value, nn.Module)
        bases = [base for base in cls.__mro__ if base is not object]
        plain = all(base.__flags__ & _HEAP_TYPE and not base.__dict__.get("__slots__") for base in bases)
        if not (own_or_module and plain):
            raise NamelessError(f"a {cls.__module__}.{cls.__qualname__}")
        self._parts("instance", cls)
        attributes = vars(value)
        if any(name.endswith("hooks") and held for name, held in attributes.items()):
            raise NamelessError(f"a {cls.__qualname__} with hooks")
        self._all(dict, (part for item in attributes.items() for part in item))


def environment(device: torch.device) -> dict[str, Any]:
    """What a trace on this device depends on besides the function and its arguments.

    Raises:
        NamelessError: hooks or modes that see every operation.
    """
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    if watched or nn.modules.module._has_any_global_hook():
        raise NamelessError("hooks or modes that see every operation")
    attention, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "versions": (sys.version, str(torch.__version__), torch.version.git_version, sys.modules["numpy"].__version__),
        "machine": (platform.machine(), torch.backends.cpu.get_cpu_capability()),
        "gpu": (torch.cuda.get_device_name(device), cudnn.version()) if device.type == "cuda" else None,
        "dgfast": (_sources(), os.environ.get("TRITON_INTERPRET")),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(at), torch.get_autocast_dtype(at)) for at in ("cpu", device.type)],
        "deterministic": torch.get_deterministic_debug_mode(),
        "float32": [torch._C._get_fp32_precision_getter(*of) for of in _FLOAT32],  # the older getters may raise
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": (torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled),
        "attention": (
            attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled(),
            attention.cudnn_sdp_enabled(), torch._C._get_sdp_priority_order(),
        ),
    }  # fmt: skip


@functools.cache
def _sources() -> str:
    """A hash of every module of dgfast, for what is imported inside of functions."""
    root, found = Path(__file__).parents[1], sha256()
    paths = [Path(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names]
    for path in sorted(path for path in paths if path.suffix == ".py"):
        found.update(f"{path.relative_to(root)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _contents(x: Tensor) -> str:
    dense = x.detach().cpu().contiguous()
    return sha256(dense.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in this code and in what it defines."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _names(value)


def _plain(value: Any) -> str:
    if type(value) not in _PLAIN:
        raise NamelessError(f"a set of {type(value).__name__}")
    return f"{type(value).__name__} {value!r}"


def _importable(value: Any) -> bool:
    """Whether it is what its module holds under its name."""
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _require_trusted(module: str) -> None:
    if _root(module) not in {_OWN, *_TRUSTED}:
        raise NamelessError(f"code of {module}")


def _require_untouched(members: Iterable[Any]) -> None:
    """Raise NamelessError if somebody has put a function of their own into a trusted class or module."""
    for value in members:
        if isinstance(value, types.FunctionType):
            _require_trusted(str(value.__globals__.get("__name__")))
        elif isinstance(value, type):
            _require_trusted(value.__module__)
        elif callable(value) and _root(type(value).__module__) not in ("torch", "builtins"):
            raise NamelessError(f"a {type(value).__qualname__} in the place of a function")


def _root(module: str) -> str:
    return module.partition(".")[0]
