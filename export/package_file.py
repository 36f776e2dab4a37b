"""Writing a package and not believing it: opened, run on inputs it has not seen, and removed if it is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dgfast.export.parity import Report
from dgfast.export.proof import TOLERANCES, value_rows
from dgfast.export.subject import Subject
from dgfast.graph.cache import lowered
from dgfast.runtimes.package.engine import INPUTS, OUTPUTS, TOLERANCE, PackageEngine, add_self_test
from dgfast.runtimes.package.file import write


def export(
    subject: Subject, reference: Subject, path: Path, *, batch: int, dtype: str, device: torch.device,
    metadata: Mapping[str, str],
) -> Report:  # fmt: skip
    """Compile `subject` into a package, compare it with `reference`, and leave the file there only if it is right.

    Args:
        subject: the function on that device, its networks in `dtype`. reference: the same in float32 on the CPU.

    Raises:
        ParityError: what is wrong with the file, which is then gone; its report stays.
        UserError: the function does not trace, or a compiler fails.
    """
    example = subject.example(batch, seed=1)
    said = {INPUTS: json.dumps(subject.inputs), OUTPUTS: json.dumps(subject.outputs), "dtype": dtype}
    said[TOLERANCE] = str(TOLERANCES[dtype])
    arguments = [example[name].to(device) for name in subject.inputs]
    try:
        write(lowered(subject.function, arguments), arguments, path, {**metadata, **said})
        engine = PackageEngine(path, device)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.float().cpu() for name, x in engine(inputs).items()}

        report = Report(value_rows(run, reference, batch, dtype))
        report.write(path, metadata, dtype=dtype)
        report.check()
        inputs = reference.cases(batch)[-1].inputs  # its weights are such that no branch is idle
        add_self_test(path, inputs, run(inputs))
        PackageEngine(path, device).self_test()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return report
