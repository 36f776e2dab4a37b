"""A GPU that is not there: tensors lie on the CPU and say that they are on CUDA, and torch.cuda answers as for one.

What code does on CUDA is executed with it wherever there is no GPU; kernels and compilers are what it does not stand in
for.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
NAME, CAPABILITY = "Pretended GPU", (8, 9)
_FROM_TENSOR = FakeTensorMode.from_tensor


class Graph(TorchDispatchMode):
    """In the place of a CUDA graph: the operations with their tensors, which it computes again where they lie."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves its constructor untyped
        self.recorded: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))

        def again() -> None:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **(kwargs or {}))), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        self.recorded.append(again)
        return made

    def replay(self) -> None:
        for again in self.recorded:
            again()


class Stream:
    """One that is done as soon as it is asked."""

    cuda_stream = 7

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self) -> None:
        pass

    def record_event(self) -> "Stream":
        return self


class _OnCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # a getter of C
            device = func(*args)
            return device if device.type != "cpu" or _traces() else CUDA
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_on_the_cpu, (args, kwargs or {}))
        return func(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))


def _traces() -> bool:
    return not isinstance(_get_current_dispatch_mode(), Graph | None)


def _on_the_cpu(value: object) -> object:
    named = str(value) if isinstance(value, torch.device | str) else ""
    return torch.device("cpu") if named.partition(":")[0] == "cuda" else value


_PROPERTIES = SimpleNamespace(
    name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=2**33, multi_processor_count=66
)
STREAMS: dict[str, Any] = {
    "Stream": Stream, "Event": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": Graph, "graph": lambda graph, **settings: graph,
}  # fmt: skip
_GPU: dict[str, Any] = {
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME, "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "synchronize": lambda device=None: None, "empty_cache": lambda: None,
    "device": lambda device: contextlib.nullcontext(), "device_of": lambda tensor: contextlib.nullcontext(),
}  # fmt: skip


def _faked(mode: FakeTensorMode, tensor: Tensor, **how: Any) -> Any:
    """What computes without values looks closely at devices: it does so on the CPU."""
    with torch._C.DisableTorchFunction():
        return _FROM_TENSOR(mode, tensor, **how)


def compiled(graph: GraphModule, example: Sequence[Tensor | None], part: str = "") -> Callable[..., tuple[Tensor, ...]]:
    """In place of `package.build.compiled`: runs the graph, for arguments of the forms that it was given alone."""
    forms = [_form(x) for x in example]

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        assert [_form(x) for x in arguments] == forms
        results = graph(*arguments)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    return run


def _form(x: Tensor | None) -> object:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it this machine has a GPU."""
    with (
        mock.patch.multiple(torch.cuda, **STREAMS, **_GPU),
        mock.patch.object(FakeTensorMode, "from_tensor", _faked),
        _OnCuda(),
    ):
        yield
