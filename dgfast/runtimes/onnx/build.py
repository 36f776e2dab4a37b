"""A pure function through ONNX Runtime: exported to a file that nobody keeps, and opened.

ONNX Runtime computes in float32; what comes in as float64 goes out as float64.
"""

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgfast import extras
from dgfast.graph import Function
from dgfast.graph.agreement import relative_error
from dgfast.ops import kernels
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine, providers
from dgfast.runtimes.onnx.writer import convert

_ROUNDING = 1e-4  # the most that parts and whole may differ, relative: kernels round by the size of a batch
_LEAST_PART = 8  # samples from which on a thread of its own pays for calling every operation on fewer of them


def require(device: torch.device) -> None:
    """
    Raises:
        UserError: onnx or ONNX Runtime is missing, or has no provider for that device.
    """
    extras.require("onnx", "onnxruntime")
    providers(device.type, device)


def build(function: Function, example: Sequence[Tensor | None], provider: str | None = None) -> Function:
    """`function` exported for the shapes of `example` and opened on the device of its tensors.

    Values agree with `function` to float32 rounding. On a CPU every thread computes a part of a large batch of its own:
    threads that share each operation would wait for one another after each, some thousand times a call. A function in
    which one sample depends on another gets the whole batch.

    Args:
        provider: "cpu", "cuda" or "tensorrt"; None: what suits the device of the tensors.

    Raises:
        UserError: the function cannot be exported, onnx or ONNX Runtime is missing or has no such provider.
    """
    extras.require("onnx")
    of_tensors, inputs, outputs = named(function, example)
    first = next(iter(inputs.values()))
    threads = torch.get_num_threads()
    parts = _parts(len(first), threads) if (provider or first.device.type) == "cpu" else 1
    if parts > 1 and not _agree(of_tensors, inputs, parts):
        parts = 1
    model = convert(of_tensors, {name: x[: len(x) // parts] for name, x in inputs.items()}, outputs)
    if parts > 1 and _reduces_the_batch(model):
        parts, model = 1, convert(of_tensors, inputs, outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "function.onnx"
        save(model, path)
        engine = OnnxEngine(path, first.device, provider, threads=1 if parts > 1 else threads)

    pool = ThreadPoolExecutor(parts)

    def compute(*tensors: Tensor) -> list[Tensor]:
        return list(engine(dict(zip(inputs, tensors, strict=True))).values())

    def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        tensors = [single(x) for x in arguments if x is not None]
        results = list(pool.map(compute, *(x.chunk(parts) for x in tensors))) if parts > 1 else [compute(*tensors)]
        dtype = next(x.dtype for x in arguments if x is not None)
        return tuple(torch.cat(pieces).to(dtype) for pieces in zip(*results, strict=True))

    return run


def named(function: Function, example: Sequence[Tensor | None]) -> tuple[Function, dict[str, Tensor], list[str]]:
    """What a file is made of: the function of those arguments that are not None, their example, names of its results.

    The example is float32 where it was float64.
    """
    given = {f"input_{i}": single(x) for i, x in enumerate(example) if x is not None}

    def of_given(*arguments: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(arguments)
        return function(*(None if x is None else next(remaining) for x in example))

    with torch.no_grad(), kernels("reference"):
        results = of_given(*(x[:1] for x in given.values()))
    return of_given, given, [f"output_{i}" for i in range(len(results))]


def _parts(batch: int, threads: int) -> int:
    """Into how many equal parts to divide a batch; 1 where they were too small, or most threads had none."""
    parts = max(n for n in range(1, threads + 1) if batch % n == 0)
    return parts if 2 * parts > threads and batch >= _LEAST_PART * parts else 1


def _agree(function: Function, inputs: Mapping[str, Tensor], parts: int) -> bool:
    """Whether the parts of a batch give what the whole batch gives, where every sample is another one."""
    generator = torch.Generator().manual_seed(0)
    tensors = [_unlike(x, generator) for x in inputs.values()]
    with torch.no_grad():
        whole = function(*tensors)
        pieces = [function(*part) for part in zip(*(x.chunk(parts) for x in tensors), strict=True)]
    joined = (torch.cat(results) for results in zip(*pieces, strict=True))
    return all(relative_error(mine, wanted) <= _ROUNDING for mine, wanted in zip(joined, whole, strict=True))


def _unlike(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the tensor's shape and type, positive ones where there is one a sample, as noise levels are."""
    if not x.is_floating_point():
        return x
    random = torch.randn(x.shape, generator=generator).to(x.dtype)
    return random.exp() if x.dim() < 2 else random


def _reduces_the_batch(model: Any) -> bool:
    """Whether anything is reduced over the batch: what only decides a threshold, random samples need not show."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = (constants[node.input[1]] for node in model.graph.node if node.op_type.startswith("Reduce"))
    return any(0 in numpy_helper.to_array(tensor) for tensor in axes)


def single(x: Tensor) -> Tensor:
    """x, in float32 where it is float64."""
    return x.float() if x.dtype == torch.float64 else x
