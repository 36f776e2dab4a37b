"""What to say of an engine: where it may run, what it is made of, and, if it could run here, how right and how fast."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from dgfast.export.parity import Report, Runs, Tensors
from dgfast.export.subject import Subject
from dgfast.runtimes import RUNTIMES
from dgfast.runtimes.tensorrt.builder import Built
from dgfast.runtimes.tensorrt.file import NEVER_EXECUTED, EngineFile
from dgfast.runtimes.tensorrt.library import FLAVORS

_WARM_UP, _ROUNDS = 5, 30


def headline(file: EngineFile) -> str:
    """What it is and whether it was ever executed, in a line."""
    least, best, most = file.batch
    sizes = f"batch {least}" if least == most else f"batch {least} to {most}, tuned for {best}"
    state = file.parity + (f" ({file.never_because})" if file.parity == NEVER_EXECUTED else "")
    return f"{file.path}: {FLAVORS[file.flavor].title} {file.version}, {file.dtype}, {sizes}: {state}"


def summary(file: EngineFile, built: Built, layer_table: str, parity: Report | None, latency: str) -> str:
    """The report in markdown."""
    lines = [
        headline(file), "",
        f"Built in {built.seconds:.1f} s: {len(built.plan) / 1e6:.1f} MB, {built.parsed_layers} layers in the network, "
        f"{len(built.layers)} in the engine. Built on {file.gpu or 'a machine without a GPU'}, "
        f"for {', '.join(file.capabilities) or 'the GPUs that its library chose'}.", "",
        layer_table,
    ]  # fmt: skip
    if parity is None:
        lines += [
            "", f"Never executed: {file.never_because}. Nothing is known of its values or its speed; load it where it "
            "can run, and it tests itself against self_test.npz.",
        ]  # fmt: skip
    else:
        lines += ["", "```", parity.table().rstrip(), "```", "", latency]
    return "\n".join(lines).rstrip() + "\n"


def against_eager(engine: Runs, subject: Subject, inputs: Mapping[int, Tensors], device: torch.device) -> str:
    """The latency table of the engine beside the eager and the compiled function, in float32 without TF32."""
    tables: list[str] = []
    for batch, given in inputs.items():
        example = tuple(given[name].to(device) for name in subject.inputs)
        built = RUNTIMES["compiled"].whole(subject.function, example)

        def run(inputs: Tensors, function: Callable[..., object] = built) -> object:
            return function(*(inputs[name] for name in subject.inputs))

        def eager(inputs: Tensors) -> object:
            with torch.no_grad():
                return subject.function(*(inputs[name] for name in subject.inputs))

        table = latency_table({"eager": eager, "compiled": run, "engine": engine}, {batch: given}, device)
        tables += table.splitlines()[2 if tables else 0 :]
    return "\n".join(tables)


def latency_table(
    runs: Mapping[str, Callable[[Tensors], object]], inputs: Mapping[int, Tensors], device: torch.device
) -> str:
    """Median milliseconds of a call of each, by batch size, inputs on the GPU already, in markdown."""
    rows = ["| batch | " + " | ".join(f"{name}, ms" for name in runs) + " |", "|" + " --- |" * (1 + len(runs))]
    for batch, given in inputs.items():
        placed = {name: x.to(device) for name, x in given.items()}
        times = [1e3 * _seconds(partial(run, placed)) for run in runs.values()]
        rows.append(f"| {batch} | " + " | ".join(f"{ms:.2f}" for ms in times) + " |")
    return "\n".join(rows)


def _seconds(call: Callable[[], object]) -> float:
    def once() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(_WARM_UP):
        once()
    return statistics.median(once() for _ in range(_ROUNDS))
