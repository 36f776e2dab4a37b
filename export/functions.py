"""Users' functions as files: the same proof as dgfast's own get, on inputs around the user's example.

dgfast.export_onnx(function, example, "forces.onnx")
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgfast import __version__
from dgfast.errors import UserError, one_line
from dgfast.export import onnx_file
from dgfast.export.parity import Case, Report, Row, Runs, Tensors
from dgfast.export.proof import tolerance
from dgfast.export.subject import Forms
from dgfast.extras import require
from dgfast.functions.compiled import further, in_double, untraceable
from dgfast.functions.flat import Example, Flat, flat
from dgfast.functions.trials import resized, trials
from dgfast.graph.agreement import LEAST
from dgfast.graph.trace import UntraceableError

Function = Callable[..., Any]


@dataclass(frozen=True)
class FunctionSubject:
    """A user's function; see `subject.Subject`.

    Attributes:
        open: inputs whose first size is left open. others: further inputs to compare on. dtype: "float64" or "float32".
    """

    function: Flat
    open: tuple[str, ...]
    others: tuple[Mapping[str, Tensor], ...]
    what: str = "function"
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.function.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.function.outputs

    @property
    def dtype(self) -> str:
        return "float64" if in_double(self.function) else "float32"

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        results = self.function(*(inputs[name] for name in self.inputs))
        return {name: x.cpu() for name, x in zip(self.outputs, results, strict=True)}

    def varied(self) -> tuple[str, ...]:
        return self.open

    def forms(self, batch: int | None) -> Forms:
        """As two calls show them, where the batch is open: what differs is open."""
        one, other = ({**inputs, **self(inputs)} for inputs in (self.example(2, 0), self.example(3, 0)))
        return {
            name: (tuple(a if a == b else "batch" for a, b in zip(x.shape, other[name].shape, strict=True)), x.dtype)
            for name, x in one.items()
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: x.dtype for name, x in self(self.function.example).items()}

    def example(self, batch: int, seed: int) -> Tensors:
        """The user's own, with as many samples where their number is open."""
        return {
            name: resized(x, batch).detach() if name in self.open else x.detach()
            for name, x in self.function.example.items()
        }

    def cases(self, batch: int) -> list[Case]:
        made = trials(self.function, self.others, dict.fromkeys(self.open, batch))
        size = f"batch {batch}, " if self.open else ""
        return [Case(f"{size}{trial.name}", trial.inputs, trial.least(tolerance(self.dtype))) for trial in made]

    def whole_run(
        self, reference: Runs, candidate: Runs, batch: int, tolerance: float, share: float = 1.0
    ) -> list[Row]:
        return []

    def said(self, case: Case) -> dict[str, str]:
        """What a file says of itself, whose self-test this case is."""
        least = {name: float(size) for name, size in case.least.items()}
        return {"dgfast": __version__, "what": self.what, LEAST: json.dumps(least)}


def export_onnx(
    function: Function, example: Example, path: str | Path, *, dynamic: str | Sequence[str] = (),
    others: Sequence[Example] = (), opset: int = onnx_file.OPSET,
) -> Report:  # fmt: skip
    """Write a pure function of tensors, gradients inside, as one ONNX file, which is kept only if it is right.

    Args:
        function, example, others: see `dgfast.compile`. What is given in double precision is computed in it.
        dynamic: names of the arguments whose first size is open, a common one; all other sizes are the example's.

    Returns:
        how far the file is from the function, on inputs other than the example; it lies beside the file, too.

    Raises:
        UserError: the function is not pure, does not trace or has an operation that ONNX has not; a size that is open
            does not stay one; ParityError: the file is not what the function is, and is gone.
    """
    require("onnx", "onnxruntime")
    return _onnx(_subject(function, example, dynamic, others), Path(path), opset, "onnxruntime")


def export_package(function: Function, example: Example, path: str | Path, *, others: Sequence[Example] = ()) -> Report:
    """The same as a package of machine code (.pt2), for the example's sizes, this PyTorch and this kind of processor.

    Raises:
        UserError: as `export_onnx`, or a compiler fails.
    """
    from dgfast.export import package_file

    subject = _subject(function, example, (), others)
    device = next(iter(subject.function.example.values())).device
    with _traced():
        return package_file.export(
            subject, subject, _suffixed(path, ".pt2"), batch=1, dtype=subject.dtype, device=device,
            metadata=subject.said(subject.cases(1)[-1]),
        )  # fmt: skip


def export_tensorrt(
    function: Function, example: Example, folder: str | Path, *, others: Sequence[Example] = (),
    flavor: str | None = None,
) -> None:  # fmt: skip
    """The same as a folder with a TensorRT engine, as `python -m dgfast.export.to_trt` writes it, in float32.

    Args:
        flavor: "tensorrt" or "tensorrt-rtx"; None: whichever is installed.

    Raises:
        UserError: as `export_onnx`, the function is in double precision, or the library refuses the file.
    """
    require("onnx", "onnxruntime")
    from dgfast.export import to_trt
    from dgfast.runtimes.tensorrt.builder import Options
    from dgfast.runtimes.tensorrt.library import find

    subject, out = _subject(function, example, (), others), Path(folder)
    if subject.dtype == "float64":
        raise UserError("TensorRT has no double precision: give an example in float32")
    name, trt = find(flavor)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "function.onnx"
    _onnx(subject, file, onnx_file.OPSET, "tensorrt")
    to_trt.built_of(file, file, "float32", Options((1, 1, 1)), name, trt, out, lambda device: subject)


def _subject(
    function: Function, example: Example, dynamic: str | Sequence[str], others: Sequence[Example]
) -> FunctionSubject:
    of_tensors, dynamic = flat(function, example), (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
    for name in dynamic:
        if name not in of_tensors.inputs or not of_tensors.example[name].dim():
            known = ", ".join(n for n, x in of_tensors.example.items() if x.dim())
            raise UserError(f"dynamic={name}: there is no such argument with a first size; there are {known}")
    subject = FunctionSubject(of_tensors, dynamic, tuple(further(of_tensors, others)))
    if dynamic:
        _require_open(subject)
    return subject


def _require_open(subject: FunctionSubject) -> None:
    """
    Raises:
        UserError: the function takes the open size of the example alone.
    """
    try:
        subject.forms(None)
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(one_line(
            f"dynamic={','.join(subject.open)}: the function fails for another first size, {error}; name all the "
            "arguments that have it"
        )) from error  # fmt: skip


def _onnx(subject: FunctionSubject, path: Path, opset: int, target: str) -> Report:
    first = next((x for x in subject.function.example.values() if x.dim()), torch.zeros(1))
    batch, path = None if subject.open else len(first), _suffixed(path, ".onnx")
    doubles = {name for name, x in subject.function.example.items() if x.dtype == torch.float64}
    if doubles and subject.dtype != "float64":
        raise UserError(f"{', '.join(sorted(doubles))} in double precision, others in single: a file has one, give one")
    with _traced():
        return onnx_file.export(
            subject, path, batch=batch, dtype=subject.dtype, opset=opset, target=target,
            metadata=subject.said(subject.cases(1)[0]),
        )  # fmt: skip


@contextmanager
def _traced() -> Iterator[None]:
    """Says of a function that does not trace that it is the user's."""
    try:
        yield
    except UntraceableError as error:
        raise UserError(untraceable(error)) from error


def _suffixed(path: str | Path, suffix: str) -> Path:
    """
    Raises:
        UserError: the file would have another suffix, or its folder is not there.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise UserError(f"{path}: give a name that ends in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    return path
