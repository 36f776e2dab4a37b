"""Write one .pt2 package with what a sampler calls, input gradients inside, or a one-step generator, as machine code.

It runs at full speed without Python (see examples/package_only.cpp): PyTorch's AOTInductor compiles it, for one version
of PyTorch, one batch size, and the kind of processor or GPU of this machine. The file lies in the folder only if, on
inputs it had not seen, it returned what eager float32 returns. Its parity report lies beside it in any case. What is
not given is the bundle's own default.
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


@click.command(cls=GuidedCommand, exported=True, help=__doc__)
@BUNDLE
@WHAT
@option("--device", group=Group.RUNTIME, metavar="NAME", help="What to compile for.  [default: a GPU if there is one]")
@option(
    "--dtype",
    group=Group.RUNTIME,
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    help="Of the networks' weights.",
)
@option("--batch", group=Group.OUTPUT, type=click.IntRange(min=1), default=64, help="Images a call.")
@EXPORTED_OUT
def main(bundle: str, device: str | None, dtype: str, batch: int, out: Path, **options: Any) -> None:
    with interruptible("stopped before a file was written"):
        from dgfast.devices import pick_device
        from dgfast.export import request

        asked, at = request.read(bundle, options), pick_device(device)
        request.make_folder(out)
        began = time.perf_counter()
        path = asked.package(out, batch=batch, dtype=dtype, device=at)
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        click.echo(f"compiled and proved in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
