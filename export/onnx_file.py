"""Writing an ONNX file and not believing it: reopened, run on inputs it has not seen, and removed if it is wrong."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgfast.export.half_products import half_products, round_on_a_cpu
from dgfast.export.parity import ParityError, Report, Row, signature
from dgfast.export.proof import TOLERANCES, value_rows
from dgfast.export.subject import Subject
from dgfast.runtimes.onnx.file import remove, save
from dgfast.runtimes.onnx.session import OnnxEngine, stored_tensor
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
    rank_4: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write `subject` to `path`, reopen it, compare the two, and leave the file there only if it is right.

    Args:
        batch: None leaves it open. dtype: of the matrix products, "float32" or "fp16".

    Raises:
        ParityError: what is wrong with the file, which is then gone; its report stays.
        UserError: the function cannot be exported.
    """
    try:
        counted = _written(subject, path, batch, dtype, opset, rank_4, metadata)
        say(f"{counted.total()} nodes: {', '.join(f'{op} {n}' for op, n in counted.most_common())}")
        report = _proved(path, subject, batch, dtype)
        report.write(path, metadata, dtype=dtype, nodes=dict(counted.most_common()))
        report.check()
    except BaseException:
        remove(path)
        raise
    return report


def _written(
    subject: Subject, path: Path, batch: int | None, dtype: str, opset: int, rank_4: bool, metadata: dict[str, str]
) -> Counter[str]:
    """Write the file; how many nodes of each kind it has. The model itself, which may be large, is left behind here."""
    example = dict(subject.example(batch or 2, seed=1))
    model = convert(subject.function, example, subject.outputs, dynamic=batch is None, opset=opset, rank_4=rank_4)
    if dtype != "float32":
        half_products(model, dtype)
    counted = operations(model)
    _stamp(model, metadata | {"opset": str(opset), "dtype": dtype, "nodes": str(counted.total())})
    save(model, path)
    return counted


def _proved(path: Path, subject: Subject, batch: int | None, dtype: str) -> Report:
    """The report; if it is a good one, the file has a self-test and its parity figures in it."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    _require_default_domain(model)
    engine = OnnxEngine(path)
    rows = list(_signature_rows(engine, subject, batch)) or value_rows(engine, subject, batch, dtype)
    if dtype != "float32" and not any(row.problem for row in rows):
        rows += _rounded_rows(path, subject, batch, dtype)
    report = Report(rows)
    if report.passed:
        _stamp(model, {"parity": json.dumps(report.worst), "self_test": _self_test(engine, subject, batch, dtype)})
        partial = path.with_name(f"{path.name}.partial")
        onnx.save(model, partial, format="protobuf")  # weights in a file of their own stay where they are
        partial.replace(path)
        OnnxEngine(path).self_test()
    return report


def _rounded_rows(path: Path, subject: Subject, batch: int | None, dtype: str) -> list[Row]:
    """The same of a copy that rounds where a GPU does, which ONNX Runtime's CPU provider does not."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        copy, model = Path(folder, path.name), onnx.load(path)
        round_on_a_cpu(model)
        save(model, copy)
        rows = value_rows(OnnxEngine(copy), subject, batch, dtype)
    return [replace(row, case=f"{row.case}, rounded as on a GPU") for row in rows]


def _signature_rows(engine: OnnxEngine, subject: Subject, batch: int | None) -> Iterator[Row]:
    size: Any = batch or "batch"
    shapes: dict[str, tuple[Any, ...]] = {name: (size, *rest) for name, rest in subject.sizes().items()}
    for what, names, found in (("inputs", subject.inputs, engine.inputs), ("outputs", subject.outputs, engine.outputs)):
        yield from signature({name: (shapes.get(name, (1,)), "tensor(float)") for name in names}, found, what)


def _self_test(engine: OnnxEngine, subject: Subject, batch: int | None, dtype: str) -> str:
    """One sample's inputs and outputs, repeated to the file's batch when they are run."""
    case, count = subject.example(1, seed=11), batch or 1
    inputs = {n: x.expand(count, *x.shape[1:]) if n not in subject.weights else x for n, x in case.items()}
    results = engine(inputs)
    stored = {k: {n: stored_tensor(x) for n, x in v.items()} for k, v in (("inputs", inputs), ("outputs", results))}
    return json.dumps({"tolerance": 10 * TOLERANCES[dtype], **stored})


def _stamp(model: Any, metadata: dict[str, str]) -> None:
    entries = {entry.key: entry for entry in model.metadata_props}
    for key, value in metadata.items():
        (entries.get(key) or model.metadata_props.add(key=key)).value = value


def _require_default_domain(model: Any) -> None:
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign or model.functions:
        raise ParityError(f"the file has operations outside of ONNX's own: {', '.join(foreign) or 'local functions'}")
