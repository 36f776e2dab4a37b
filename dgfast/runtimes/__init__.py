"""Ways to execute a pure function, in one table.

A runtime changes how a function runs and never what it returns. Each has a folder here with a module `build`, which is
imported when it is first needed: this module imports nothing that is slow or not always installed.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dgfast.errors import UserError
from dgfast.graph import Function, form

if TYPE_CHECKING:
    import torch

Example = Sequence["torch.Tensor | None"]
"""Arguments of a function; their values do not matter."""
Build = Callable[[Function, Example], Function]
"""Makes a faster callable of a function, for arguments of the example's shapes and types."""

SIZES = 4
"""Batch sizes for which a sampler keeps what it has built: a job has two, its full batch and the rest of a chunk."""

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
"""Number formats of `--dtype`, see `devices.DTYPES`."""


@dataclass(frozen=True)
class Runtime:
    """A way to execute pure functions of tensors.

    Attributes:
        build: a `Build`. Results agree with the function's to `tolerance`.
        capture: gives, for a device, a `Build` for whole steps of a solver, which call what `build` made: one launch a
            step. None where that gains nothing.
        prepare: told which functions will be built for which examples, it may do together what takes long.
        require: raises a UserError where something that it needs on a device is not installed, in one line.
        precisions: those of `PRECISIONS` in which the networks may be.
        tolerance: the most that a result may be off in float32, see `agreement.relative_error`.
        open: opens an engine file: (path, device) -> `engines.Engine`. None where there are no such files.
    """

    name: str
    build: Build
    capture: "Callable[[torch.device], Build | None]" = lambda device: None
    require: "Callable[[torch.device], None]" = lambda device: None
    prepare: Callable[[Sequence[tuple[Function, Example]]], None] = lambda functions: None
    precisions: Collection[str] = PRECISIONS
    tolerance: float = 2e-5
    open: Callable[..., Any] | None = None

    def missing(self, device: "torch.device") -> str | None:
        """What must be installed before it runs on that device, in one line; None if nothing."""
        try:
            self.require(device)
        except UserError as error:
            return error.message
        return None

    def whole(self, function: Function, example: Example) -> Function:
        """The function built, and captured where the runtime does that: for one that is no part of a larger step."""
        built, capture = self.build(function, example), self.capture(_device(example))
        return built if capture is None else capture(built, example)


RuntimeLike = Runtime | str | Build
"""What `chosen` takes for a runtime."""


def chosen(runtime: RuntimeLike) -> Runtime:
    """The runtime itself, the one of that name, or one of your own, which consists of its `Build`.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(runtime, Runtime):
        return runtime
    if callable(runtime):
        return Runtime("custom", runtime)
    if runtime not in RUNTIMES:
        raise UserError(f"no runtime {runtime}: there are {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime]


class Kept:
    """Functions that were built, for the `SIZES` batch sizes that were asked for last.

    A captured function holds the memory of its whole batch: those of sizes that nobody asks for any more are given up.
    """

    def __init__(self) -> None:
        self._of_size: dict[int, dict[Hashable, Function]] = {}

    def __call__(self, identity: Hashable, example: Example, build: Callable[[], Function]) -> Function:
        """The function of that identity for arguments of the example's form; `build` makes it where it is not there."""
        batch = next(len(x) for x in example if x is not None)
        functions = self._of_size[batch] = self._of_size.pop(batch, {})  # which puts it behind the others
        if len(self._of_size) > SIZES:
            del self._of_size[next(iter(self._of_size))]
        key = identity, form(example)
        if key not in functions:
            functions[key] = build()
        return functions[key]

    def clear(self) -> None:
        """Give all of them up."""
        self._of_size.clear()


def _device(example: Example) -> "torch.device":
    return next(x.device for x in example if x is not None)


def _of(module: str, name: str) -> Callable[..., Any]:
    """A function of a module in this folder, imported when it is first called."""
    return lambda *arguments, **keywords: getattr(import_module(f"{__name__}.{module}"), name)(*arguments, **keywords)


def _eager(function: Function, example: Example) -> Function:
    return function


def _compiler(device: "torch.device") -> str:
    """The module that compiles for a device."""
    return "cuda.build" if device.type == "cuda" else "cpu.build"


def _compiled(function: Function, example: Example) -> Function:
    return _of(_compiler(_device(example)), "build")(function, example)


def _prepare_compiled(functions: Sequence[tuple[Function, Example]]) -> None:
    if functions and _device(functions[0][1]).type == "cuda":
        _of("cuda.build", "prepare")(functions)


def _require_compiler(device: "torch.device") -> None:
    _of(_compiler(device), "require")()


def _cuda_graph(device: "torch.device") -> Build | None:
    return _of("cuda.capture", "capture") if device.type == "cuda" else None


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", _eager),
        Runtime("compiled", _compiled, _cuda_graph, _require_compiler, _prepare_compiled),
        Runtime(
            "onnx", _of("onnx.build", "build"), require=_of("onnx.build", "require"), tolerance=1e-4,
            open=_of("onnx.session", "OnnxEngine"),
        ),
        Runtime(
            "package", _of("package.build", "build"), _cuda_graph, _of("package.build", "require"),
            _of("package.build", "prepare"), open=_of("package.engine", "PackageEngine"),
        ),
        Runtime(
            "tensorrt", _of("tensorrt.build", "build"), require=_of("tensorrt.build", "require"), tolerance=1e-4,
            precisions=("float32",), open=_of("tensorrt.engine", "load"),
        ),
    )
}  # fmt: skip
"""Every runtime of dgfast by its name, as `--runtime` has them."""
