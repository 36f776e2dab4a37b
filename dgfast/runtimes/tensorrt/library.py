"""TensorRT and TensorRT for RTX: two libraries of one interface, which are found, listened to and asked here.

Nothing else imports either. What needs one takes the module as an argument.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from dgfast.errors import UserError


@dataclass(frozen=True)
class Flavor:
    """One of the two libraries.

    Attributes:
        modules: names under which Python may know it.
        install: how to get it, for error messages.
        capabilities: whether it builds for listed compute capabilities; the other builds for the GPU that is there.
    """

    title: str
    modules: tuple[str, ...]
    install: str
    capabilities: bool


FLAVORS = {
    "tensorrt": Flavor(
        "TensorRT", ("tensorrt",), "pip install 'dgfast[trt]' (libraries from NVIDIA's own package index)", False
    ),
    "tensorrt-rtx": Flavor(
        "TensorRT for RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "pip install 'dgfast[trt-rtx]'", True
    ),
}


def find(flavor: str | None = None) -> tuple[str, Any]:
    """The name of a flavor and its module: the given one, or else the first that is installed.

    Raises:
        UserError: it is not there, or its libraries do not load; names the extra that brings it.
    """
    reasons = []
    for name in [flavor] if flavor else FLAVORS:
        for module in FLAVORS[name].modules:
            try:
                trt = import_module(module)
            except (ImportError, OSError) as error:  # OSError: a shared library that does not load
                if getattr(error, "name", None) != module:
                    reasons.append(f"{module} does not load: {_first_line(error)}")
                continue
            if hasattr(trt, "Builder"):  # type stubs alone leave an importable folder without anything in it
                return name, trt
    flavors = [FLAVORS[flavor]] if flavor else list(FLAVORS.values())
    how = " or ".join(f"{f.title}: {f.install}" for f in flavors)
    because = f" ({'; '.join(reasons)})" if reasons else ""
    raise UserError(f"{' and '.join(f.title for f in flavors)} not installed here{because}; install {how}")


def listener(trt: Any) -> Any:
    """The process's logger of that library, which prints nothing; it has heard nothing yet.

    It keeps warnings and errors in `complaints`, and in `layers` what the builder says of the engine's layers.

    There is one, as the library wants it. It warns of a second one while it holds the lock that every runtime takes at
    its end: Python's garbage collector, which any line of a logger may start, would wait for ever to end a runtime.
    """
    heard = _listener(trt)
    heard.forget()
    return heard


@cache
def _listener(trt: Any) -> Any:
    class Listener(trt.ILogger):  # type: ignore[misc]  # the library is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.complaints: list[tuple[Any, str]] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                self.complaints.append((severity, message))
            elif message.startswith("Layers:"):
                self.layers = message

        def errors(self) -> list[str]:
            """The errors so far, a line each, without the library's own source lines."""
            grave = int(trt.ILogger.Severity.ERROR)
            return [_plain(message) for severity, message in self.complaints if int(severity) <= grave]

    return Listener()


def deserialize(trt: Any, plan: bytes, listener: Any, name: object) -> Any:
    """The engine that `plan` holds.

    Raises:
        UserError: the library refuses it; says why.
    """
    runtime = trt.Runtime(listener)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = next(iter(listener.errors()), "no reason given")
        raise UserError(f"{name}: {trt.__name__} {trt.__version__} can't load this engine: {reason}; build it again")
    return engine


def obstacles(trt: Any, plan: bytes, listener: Any) -> list[str]:
    """Why this machine can't run the engine, by the library's own judgement; empty if it can, or if it has none."""
    judge = getattr(trt.Runtime(listener), "get_engine_validity", None)
    if judge is None:
        return []
    validity, bits = judge(plan)
    if validity != trt.EngineValidity.INVALID:
        return []
    reasons = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(bits) & int(bit)]
    return [name.lower().replace("_", " ") for name in reasons] or listener.errors()[-1:] or ["invalid"]


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine: what it is, and the number types that it reads and writes."""

    name: str
    kind: str
    types: tuple[str, ...]


def layers(text: str) -> list[Layer]:
    """The layers in a text of the library's engine inspector (one a line), or of its builder's log."""
    listed = []
    for line in text.splitlines():
        match = re.match(r"Name: (.*?), LayerType: (\w+)", line.strip())
        if match:
            without_constants = re.sub(r"Constants: \[.*?\], Outputs", "Outputs", line)
            types = dict.fromkeys(re.findall(r"Datatype: (\w+)", without_constants))
            listed.append(Layer(match[1], match[2], tuple(types)))
    return listed


def layer_table(found: Sequence[Layer]) -> str:
    """Layers of each kind, and how many of them compute in which number types, in markdown."""
    columns = list(dict.fromkeys("/".join(sorted(layer.types)) or "none" for layer in found))
    rows = [f"| layer | all | {' | '.join(columns)} |", f"|{' --- |' * (2 + len(columns))}"]
    for kind in [*sorted({layer.kind for layer in found}), "all"]:
        of_kind = [layer for layer in found if kind in (layer.kind, "all")]
        counts = [sum(("/".join(sorted(layer.types)) or "none") == c for layer in of_kind) for c in columns]
        rows.append(f"| {kind} | {len(of_kind)} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows)


def _plain(message: str) -> str:
    """A log message without where in the library's source it was written."""
    return re.sub(r"\s*\.?\s*In \w+ at /\S+?:\d+", "", " ".join(message.split()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
