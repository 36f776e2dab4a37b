"""Writing an ONNX file and not believing it: reopened, run on inputs it has not seen, and removed if it is wrong."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dgfast.export.half_products import half_products, round_on_a_cpu, wide_products
from dgfast.export.parity import ParityError, Report, Row, signature
from dgfast.export.proof import tolerance, value_rows
from dgfast.export.subject import Subject
from dgfast.export.written_out import written_out
from dgfast.runtimes.onnx.cuda import FUSED
from dgfast.runtimes.onnx.file import remove, save
from dgfast.runtimes.onnx.fused import OPERATORS
from dgfast.runtimes.onnx.session import KINDS, OnnxEngine, stored_tensor
from dgfast.runtimes.onnx.writer import convert, operations

OPSET = 18
"""What ONNX Runtime's CUDA provider has every operation for; of 19 and newer it computes Resize and Pad on the host."""


def export(
    subject: Subject,
    path: Path,
    *,
    batch: int | None,
    dtype: str,
    opset: int,
    metadata: dict[str, str],
    target: str = "onnxruntime",
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write `subject` to `path`, reopen it, compare the two, and leave the file there only if it is right.

    What lay there before stays if the function cannot be written.

    Args:
        batch: None leaves it open. dtype: of the matrix products, "float32" or "fp16"; or "float64", of all numbers.
        target: who reads the file, "onnxruntime", "onnxruntime-cuda" or "tensorrt".

    Raises:
        ParityError: what is wrong with the file, which is then gone; its report stays.
        UserError: the function cannot be exported.
    """
    counted = _written(subject, path, batch, dtype, opset, target, metadata)
    try:
        say(f"{counted.total()} nodes: {', '.join(f'{op} {n}' for op, n in counted.most_common())}")
        report = _proved(path, subject, batch, dtype, target)
        report.write(path, metadata, dtype=dtype, nodes=dict(counted.most_common()))
        report.check()
    except BaseException:
        remove(path)
        raise
    return report


def _written(
    subject: Subject, path: Path, batch: int | None, dtype: str, opset: int, target: str, metadata: dict[str, str]
) -> Counter[str]:
    """Write the file; how many nodes of each kind it has. The model itself, which may be large, is left behind here."""
    example = dict(subject.example(batch or 2, seed=1))
    model = convert(
        subject.function, example, subject.outputs, dynamic=subject.varied() if batch is None else (),
        double=dtype == "float64", opset=opset, rank_4=target == "tensorrt", fused=target == FUSED,
    )  # fmt: skip
    if dtype == "fp16":
        half_products(model, dtype)
        if target != "tensorrt":  # which has no double precision
            wide_products(model)
    counted = operations(model)
    own = {"opset": str(opset), "dtype": dtype, "for": target, "nodes": str(counted.total())}
    _stamp(model, metadata | own)
    save(model, path)
    return counted


def _proved(path: Path, subject: Subject, batch: int | None, dtype: str, target: str) -> Report:
    """The report; if it is a good one, the file has a self-test and its parity figures in it."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    _require_domains(model, set(OPERATORS.values()) if target == FUSED else set())
    with tempfile.TemporaryDirectory() as folder:
        readable = path if target != FUSED else _on_a_cpu(path, Path(folder), written_out)
        engine = OnnxEngine(readable)
        rows = list(_signature_rows(engine, subject, batch)) or value_rows(engine, subject, batch, dtype)
        if dtype == "fp16" and not any(row.problem for row in rows):
            rounded = OnnxEngine(_on_a_cpu(readable, Path(folder, "rounded"), round_on_a_cpu))
            rows += [
                replace(row, case=f"{row.case}, rounded as on a GPU")
                for row in value_rows(rounded, subject, batch, dtype)
            ]
    device = "cpu" if target != FUSED else "cuda" if torch.cuda.is_available() else None
    report = Report(rows, {} if target != FUSED else {"compared": "a copy in ONNX's operators", "run on": device})
    if report.passed:
        _stamp(model, {"parity": json.dumps(report.worst), "self_test": _self_test(engine, subject, batch, dtype)})
        partial = path.with_name(f"{path.name}.partial")
        onnx.save(model, partial, format="protobuf")  # weights in a file of their own stay where they are
        partial.replace(path)
        if device is not None:
            OnnxEngine(path, device).self_test()
    return report


def _on_a_cpu(path: Path, folder: Path, rewrite: Callable[[Any], Any]) -> Path:
    """A copy of a file in that folder, rewritten so that ONNX Runtime's CPU provider does what another would."""
    import onnx

    folder.mkdir(exist_ok=True)
    copy, model = folder / path.name, onnx.load(path)
    rewrite(model)
    for entry in model.metadata_props:
        entry.value = "onnxruntime" if entry.key == "for" else entry.value
    save(model, copy)
    return copy


def _signature_rows(engine: OnnxEngine, subject: Subject, batch: int | None) -> Iterator[Row]:
    forms = subject.forms(batch)
    for what, names, found in (("inputs", subject.inputs, engine.inputs), ("outputs", subject.outputs, engine.outputs)):
        yield from signature({name: (forms[name][0], KINDS[forms[name][1]]) for name in names}, found, what)


def _self_test(engine: OnnxEngine, subject: Subject, batch: int | None, dtype: str) -> str:
    """One sample's inputs and outputs, repeated to the file's batch when they are run; of no samples, all of them."""
    case, count, varied = subject.example(1, seed=11), batch or 1, subject.varied()
    inputs = {n: x.expand(count, *x.shape[1:]) if n in varied else x for n, x in case.items()}
    results, sides, whole = engine(inputs), ("inputs", "outputs"), subject.what == "function"
    stored = {
        side: {name: stored_tensor(x, whole) for name, x in tensors.items()}
        for side, tensors in zip(sides, (inputs, results), strict=True)
    }
    return json.dumps({"tolerance": 10 * tolerance(dtype), **stored})


def _stamp(model: Any, metadata: dict[str, str]) -> None:
    entries = {entry.key: entry for entry in model.metadata_props}
    for key, value in metadata.items():
        (entries.get(key) or model.metadata_props.add(key=key)).value = value


def _require_domains(model: Any, foreign: set[str]) -> None:
    """
    Raises:
        ParityError: there is an operator that is neither ONNX's own nor of those domains, or a local function.
    """
    others = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"} - foreign)
    if others or model.functions:
        raise ParityError(f"the file has operations outside of ONNX's own: {', '.join(others) or 'local functions'}")
