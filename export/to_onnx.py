"""Write one ONNX file with what a sampler calls, input gradients inside, or a one-step generator.

The file lies in the folder only if ONNX Runtime, on inputs it had not seen, returned what eager float32 returns. Its
parity report lies beside it in any case. What is not given is the bundle's own default.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__" and not __package__:  # run by its path: no file here stands in for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dgfast.job_options import GuidedCommand
from dgfast.options import BUNDLE, EXPORTED_OUT, WHAT, Group, option
from dgfast.stopping import interruptible


class BatchSize(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """A whole number, or `dynamic`."""

    name = "n|dynamic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value in ("dynamic", None):
            return None
        if not str(value).isdecimal() or not int(value):
            self.fail(f"{value!r}: give a number of images, or dynamic", param, ctx)
        return int(value)


@click.command(cls=GuidedCommand, exported=True, help=__doc__)
@BUNDLE
@option("--batch", group=Group.OUTPUT, type=BatchSize(), default="dynamic", help="Images a call, or dynamic.")
@option("--dtype", group=Group.OUTPUT, type=click.Choice(["float32", "fp16"]), default="float32")
@option("--opset", group=Group.OUTPUT, type=int, default=18)
@option(
    "--for", "target", group=Group.OUTPUT, type=click.Choice(["onnxruntime", "onnxruntime-cuda", "tensorrt"]),
    default="onnxruntime",
    help="How normalisations are written: in ONNX's operators, in those of ONNX Runtime's CUDA provider, or so that "
    "TensorRT builds.",
)  # fmt: skip
@WHAT
@EXPORTED_OUT
def main(bundle: str, batch: int | None, dtype: str, opset: int, target: str, out: Path, **options: Any) -> None:
    with interruptible("stopped before a file was written"):
        from dgfast.extras import require

        require("onnx", "onnxruntime")
        from dgfast.export import request
        from dgfast.runtimes.onnx.file import files_of

        asked = request.read(bundle, options)
        request.make_folder(out)
        began = time.perf_counter()
        path = asked.write(out, batch=batch, dtype=dtype, opset=opset, target=target)
        for file in files_of(path):
            click.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
        click.echo(f"exported and proved in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
