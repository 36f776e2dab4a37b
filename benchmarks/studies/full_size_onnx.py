"""python -m benchmarks.studies.full_size_onnx --workload dit-xl2: a whole guided model of published size in one file.

By the code of export/to_onnx.py, at batch 1 and with random weights, but proved on fewer calls: a low and a high noise
level, under the guidance as it is and amplified until it is as large as the image. Prints what came out, how long it
took and how far it is from eager float32; exits with 1 if that is too far.
"""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks.workloads import WORKLOADS
from dgfast.export.joint_graph import joint
from dgfast.export.onnx_file import OPSET, export
from dgfast.export.parity import Case, Row, Runs
from dgfast.export.subject import Joint
from dgfast.runtimes.onnx.file import files_of

_LEVELS = 5.0, 0.5


@dataclass(frozen=True)
class Briefly(Joint):
    """A function that is proved on a few calls: each takes seconds."""

    def cases(self, batch: int) -> list[Case]:
        cases = []
        for seed, level in enumerate(_LEVELS):
            cases.append(self.case(f"sigma {level:g}", [level] * batch, seed))
            cases.append(self.amplified(f"sigma {level:g}, amplified", [level] * batch, seed))
        return cases

    def whole_run(
        self, reference: Runs, candidate: Runs, batch: int, tolerance: float, share: float = 1.0
    ) -> list[Row]:
        return []


@click.command(help=__doc__)
@click.option("--workload", "name", type=click.Choice(list(WORKLOADS)), required=True)
@click.option("--dtype", type=click.Choice(["float32", "fp16"]), default="float32", show_default=True)
@click.option(
    "--for", "target", type=click.Choice(["onnxruntime", "onnxruntime-cuda", "tensorrt"]), default="onnxruntime"
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the file there.")
def main(name: str, dtype: str, target: str, out: Path | None) -> None:
    workload, began = WORKLOADS[name](), time.perf_counter()
    networks = workload.load(torch.device("cpu"), torch.float32)
    subject = Briefly(**vars(joint(networks, workload.sampling, workload.guidance)))
    held = (networks.denoiser, networks.discriminator, networks.classifier)
    nets = [net for net in held if isinstance(net, torch.nn.Module)]
    weights = {id(w): w.numel() for net in nets for w in net.parameters()}
    click.echo(
        f"{name}: {sum(weights.values()) / 1e6:.1f} million weights, made in {time.perf_counter() - began:.0f} s"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = (out or Path(folder)) / f"{name}-{subject.what}-b1-{dtype}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        report = export(
            subject, path, batch=1, dtype=dtype, opset=OPSET, target=target,
            metadata={"workload": name, "what": subject.what},
            say=lambda line: click.echo(f"{line}\nwritten in {time.perf_counter() - began:.0f} s"),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        for file in files_of(path):
            click.echo(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    click.echo(report.table(), nl=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(f"written, reopened and proved in {seconds:.0f} s, with {peak:.1f} GiB of memory at most")


if __name__ == "__main__":
    main()
