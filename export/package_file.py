"""Writing a package and not believing it: opened, run on inputs it has not seen, and removed if it is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dgfast.export.parity import Report
from dgfast.export.proof import tolerance, value_rows
from dgfast.export.subject import Subject
from dgfast.graph.cache import lowered
from dgfast.runtimes.package.engine import INPUTS, OUTPUTS, TOLERANCE, PackageEngine, add_self_test
from dgfast.runtimes.package.file import write


def export(
    subject: Subject, reference: Subject, path: Path, *, batch: int, dtype: str, device: torch.device,
    metadata: Mapping[str, str],
) -> Report:  # fmt: skip
    """Compile `subject` into a package, compare it with `reference`, and put it there only if it is right.

    What lay there before stays if it is stopped, or cannot be compiled.

    Args:
        subject: the function on that device, its networks in `dtype`. reference: the same in float32 on the CPU.

    Raises:
        ParityError: what is wrong with the file, which is then not there; its report is.
        UserError: the function does not trace, or a compiler fails.
    """
    example = subject.example(batch, seed=1)
    said = {INPUTS: json.dumps(subject.inputs), OUTPUTS: json.dumps(subject.outputs), "dtype": dtype}
    said[TOLERANCE] = str(tolerance(dtype))
    arguments = [example[name].to(device) for name in subject.inputs]
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        new = Path(folder, path.name)
        write(lowered(subject.function, arguments), arguments, new, {**metadata, **said})
        engine, dtypes = PackageEngine(new, device), reference.dtypes()

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to("cpu", dtypes[name]) for name, x in engine(inputs).items()}

        report = Report(value_rows(run, reference, batch, dtype))
        if report.passed:
            inputs = reference.cases(batch)[-1].inputs  # its weights are such that no branch is idle
            add_self_test(new, inputs, run(inputs))
            PackageEngine(new, device).self_test()
            new.replace(path)
        else:
            path.unlink(missing_ok=True)  # the report beside it is that of another
        report.write(path, metadata, dtype=dtype)
        report.check()
    return report
