"""Writing an ONNX file and not believing it: reopened, run on inputs it has not seen, and removed if it is wrong."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgfast import __version__
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.export.joint_graph import Joint
from dgfast.export.parity import Case, ParityError, Report, Row, Runs, ValueMismatchError, compare, signature
from dgfast.runtimes.onnx import OnnxEngine, save, stored_tensor
from dgfast.runtimes.onnx_writer import convert, operations

TOLERANCES = {"float32": 1e-4, "fp16": 2e-2}
"""Largest difference from eager float32, see `parity.Row`."""
TRAJECTORY_TOLERANCES = {"float32": 2e-3, "fp16": 1e-2}
"""The same for a whole run, as a share of the pixel range, which is 2."""
OPEN_BATCHES = 1, 5


def describe(bundle: Bundle, sampling: SamplingConfig, guidance: GuidanceConfig, subject: Joint) -> dict[str, str]:
    """What a file says of itself, each value as text; numbers and lists as JSON."""
    return {
        "dgfast": __version__,
        "commit": _commit(),
        "bundle": bundle.name,
        "weights_sha256": bundle.fingerprint(),
        "what": subject.what,
        "sigmas": json.dumps(subject.sigmas),
        "weights": json.dumps(subject.weights),
        "sampling": json.dumps(asdict(sampling)),
        "guidance": json.dumps(asdict(guidance)),
        "class_names": json.dumps(bundle.class_names),
    }


def export(
    subject: Joint,
    reference: Joint,
    path: Path,
    *,
    batch: int | None,
    dtype: str,
    opset: int,
    metadata: dict[str, str],
    rank_4: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write `subject` to `path`, reopen it, compare it with `reference`, and leave it there only if it is right.

    Args:
        reference: the same function with float32 weights.
        batch: None leaves it open.

    Raises:
        ParityError: what is wrong with the file, which is then gone; its report stays.
        UserError: the function cannot be exported.
    """
    example = dict(subject.case("example", [1.0] * (batch or 2), seed=1).inputs)
    model = convert(
        subject.function, example, subject.outputs, dynamic=batch is None, opset=opset, rank_4=rank_4
    )  # fmt: skip
    counted = operations(model)
    say(f"{sum(counted.values())} nodes: {', '.join(f'{op} {n}' for op, n in counted.most_common())}")
    _stamp(model, metadata | {"opset": str(opset), "dtype": dtype, "nodes": str(sum(counted.values()))})
    try:
        report = _proved(model, subject, reference, path, batch, dtype)
        report.about.update({k: metadata[k] for k in ("bundle", "what", "weights_sha256", "commit")} | {"dtype": dtype})
        report.about["nodes"] = dict(counted.most_common())
        path.with_suffix(".parity.json").write_text(report.json() + "\n")
        path.with_suffix(".parity.txt").write_text(report.table())
        report.check()
    except BaseException:
        remove(path)
        raise
    return report


def remove(path: Path) -> None:
    """The file and its external data."""
    for file in (path, path.with_name(f"{path.name}.data"), path.with_name(f"{path.name}.partial")):
        file.unlink(missing_ok=True)


def _proved(model: Any, subject: Joint, reference: Joint, path: Path, batch: int | None, dtype: str) -> Report:
    """The file with a self-test and its parity figures in it, and the report."""
    import onnx

    save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    _require_default_domain(model)
    engine = OnnxEngine(path)
    rows = list(_signature_rows(engine, subject, batch))
    if not rows:
        sizes = [batch] if batch else list(OPEN_BATCHES)
        cases = [case for size in sizes for case in cases_of(reference, size)]
        rows = compare(reference, engine, cases, TOLERANCES[dtype], dict.fromkeys(subject.outputs, torch.float32)).rows
        rows += [trajectory(reference, reference, engine, batch or 1, TRAJECTORY_TOLERANCES[dtype])]
    report = Report(rows)
    if report.passed:
        _stamp(model, {"parity": json.dumps(report.worst), "self_test": _self_test(engine, subject, batch, dtype)})
        save(model, path)
        OnnxEngine(path).self_test()
    return report


def cases_of(subject: Joint, batch: int) -> list[Case]:
    """Noise levels inside and outside of the window; the guidance as it is and amplified."""
    levels = [80.0, 0.5, 5.0, 0.01, 0.1, 160.0, 1.0, 20.0, 0.002, 2.0]  # the window is 0.0447 to 152 by default
    known = [s for s in levels if s <= max(*subject.sigmas, 160.0)]
    cases = []
    for i, start in enumerate(range(0, len(known), max(batch, 2))):
        chosen = [known[(start + k) % len(known)] for k in range(batch)]
        name = f"batch {batch}, sigma {', '.join(f'{s:g}' for s in chosen[:5])}{', ...' if batch > 5 else ''}"
        cases.append(subject.case(name, chosen, seed=100 + i))
        if subject.weights:
            cases.append(subject.amplified(f"{name}, amplified", chosen, seed=200 + i))
        if subject.what == "step" and i == 0:
            cases.append(subject.last(cases[0]))
    return cases


def trajectory(subject: Joint, reference: Runs, candidate: Runs, batch: int, tolerance: float) -> Row:
    """A whole run of the plan with Heun's or Euler's steps, by both: largest difference in the pixel range of 2."""
    start = subject.case("", [subject.sigmas[0]] * batch, seed=7)
    images = [_run(subject, runs, dict(start.inputs)) for runs in (reference, candidate)]
    error = float((images[1].double() - images[0].double()).abs().max()) / 2
    error = error if error == error else float("inf")
    name = f"all {len(subject.sigmas) - 1} steps, share of the pixel range"
    problem = "" if error <= tolerance else ValueMismatchError.__name__
    return Row(name, "x", error, tolerance, problem, f"drifts by {error:.1e} of the pixel range")


def _run(subject: Joint, runs: Runs, inputs: dict[str, Tensor]) -> Tensor:
    count, x = len(inputs["x"]), inputs["x"]
    for sigma, sigma_next in zip(subject.sigmas[:-1], subject.sigmas[1:], strict=True):
        here = {"sigma": torch.full((count,), sigma)}
        if subject.what == "step":
            x = runs(inputs | here | {"x": x, "sigma_next": torch.full((count,), sigma_next)})["x_next"]
        else:
            d = (x - runs(inputs | here | {"x": x})["denoised"]) / sigma
            x = x + (sigma_next - sigma) * d
    return x


def _signature_rows(engine: OnnxEngine, subject: Joint, batch: int | None) -> Iterator[Row]:
    size: Any = batch or "batch"
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (size, *subject.image), "sigma": (size,), "sigma_next": (size,), "class_labels": (size, subject.label_dim),
        "denoised": (size, *subject.image), "x_next": (size, *subject.image), "log_ratio": (size,),
    }  # fmt: skip
    for what, names, found in (("inputs", subject.inputs, engine.inputs), ("outputs", subject.outputs, engine.outputs)):
        yield from signature({name: (shapes.get(name, (1,)), "tensor(float)") for name in names}, found, what)


def _self_test(engine: OnnxEngine, subject: Joint, batch: int | None, dtype: str) -> str:
    """One sample's inputs and outputs, repeated to the file's batch when they are run."""
    case = subject.case("", [1.5], seed=11)
    count = batch or 1
    inputs = {n: x.expand(count, *x.shape[1:]) if n not in subject.weights else x for n, x in case.inputs.items()}
    results = engine(inputs)
    stored = {k: {n: stored_tensor(x) for n, x in v.items()} for k, v in (("inputs", inputs), ("outputs", results))}
    return json.dumps({"tolerance": 10 * TOLERANCES[dtype], **stored})


def _stamp(model: Any, metadata: dict[str, str]) -> None:
    known = {entry.key: entry for entry in model.metadata_props}
    for key, value in metadata.items():
        (known.get(key) or model.metadata_props.add(key=key)).value = value


def _require_default_domain(model: Any) -> None:
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign or model.functions:
        raise ParityError(f"the file has operations outside of ONNX's own: {', '.join(foreign) or 'local functions'}")


def _commit() -> str:
    """The commit of the checkout that dgfast runs from, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
