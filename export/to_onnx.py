"""python export/to_onnx.py: one ONNX file with what a sampler calls, input gradients inside, or a one-step generator.

The file lies in the folder only if ONNX Runtime, on inputs it had not seen, returned what eager float32 returns. Its
parity report lies beside it in any case. What is not given is the bundle's own default.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":  # this folder's files must not stand in for packages of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.options import guidance_options


class BatchSize(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """A whole number, or `dynamic`."""

    name = "n|dynamic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value in ("dynamic", None):
            return None
        if not str(value).isdecimal() or not int(value):
            self.fail(f"{value!r}: give a number of images, or dynamic", param, ctx)
        return int(value)


@click.command(help=__doc__)
@click.option("--bundle", default="mnist32", show_default=True, help="Folder, or name of a bundle that comes along.")
@click.option(
    "--what", type=click.Choice(["denoiser", "posterior", "step", "generator"]),
    help="The guided denoiser; what the ddpm solver calls in its place; a whole step of heun or euler; the one-step "
    "generator.  [default: what the bundle's solver calls]",
)  # fmt: skip
@click.option("--batch", type=BatchSize(), default="dynamic", show_default=True, help="Images a call, or dynamic.")
@click.option("--dtype", type=click.Choice(["float32", "fp16"]), default="float32", show_default=True)
@click.option("--opset", type=int, default=20, show_default=True)
@click.option(
    "--for", "target", type=click.Choice(["onnxruntime", "tensorrt"]), default="onnxruntime", show_default=True,
    help="How normalisations are written: as ONNX Runtime is fastest, or as TensorRT can build them.",
)  # fmt: skip
@guidance_options
@click.option("--out", type=click.Path(path_type=Path), default="exported", show_default=True, help="A folder.")
def main(
    bundle: str, what: str | None, batch: int | None, dtype: str, opset: int, target: str, out: Path, **options: Any
) -> None:
    from dgfast import bundle as bundles
    from dgfast.export import onnx_file
    from dgfast.runtimes.onnx import require

    for package in ("onnx", "onnxruntime"):
        require(package)
    found = bundles.read(bundle)
    make = _generator if what == "generator" else _guided
    subject, reference, metadata = make(found, what, dtype, {k: v for k, v in options.items() if v is not None})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from error
    path = out / f"{found.name}-{subject.what}-{'dynamic' if batch is None else f'b{batch}'}-{dtype}.onnx"
    began = time.perf_counter()
    report = onnx_file.export(
        subject, reference, path, batch=batch, dtype=dtype, opset=opset, rank_4=target == "tensorrt",
        metadata=metadata | {"for": target}, say=click.echo,
    )  # fmt: skip
    click.echo(report.table(), nl=False)
    megabytes = path.stat().st_size / 1e6
    click.echo(f"{path}: {megabytes:.1f} MB, exported and proved in {time.perf_counter() - began:.0f} s")


def _guided(bundle: Any, what: str | None, dtype: str, given: dict[str, Any]) -> tuple[Any, Any, dict[str, str]]:
    """The function in `dtype` and in float32, and what the file is to say of it."""
    from dgfast.devices import DTYPES
    from dgfast.export import onnx_file
    from dgfast.export.joint_graph import joint
    from dgfast.networks import load

    sampling = replace(bundle.sampling, clip_denoised=given.pop("clip_denoised", bundle.sampling.clip_denoised))
    guidance = _possible(bundle, replace(bundle.guidance, **given))
    reference = subject = joint(load(bundle, guidance=guidance), sampling, guidance, what)
    if dtype != "float32":
        subject = joint(load(bundle, dtype=DTYPES[dtype], guidance=guidance), sampling, guidance, what)
    return subject, reference, onnx_file.describe_guided(bundle, sampling, guidance, subject)


def _generator(bundle: Any, what: str | None, dtype: str, given: dict[str, Any]) -> tuple[Any, Any, dict[str, str]]:
    """As `_guided`, for the bundle's one-step generator."""
    from dgfast.devices import DTYPES
    from dgfast.export import onnx_file
    from dgfast.export.joint_graph import generator

    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"a generator has no guidance: leave out {names}, or --what generator")
    reference = subject = generator(bundle.load("generator"))
    if dtype != "float32":
        subject = generator(bundle.load("generator", dtype=DTYPES[dtype]))
    return subject, reference, onnx_file.describe(bundle, subject)


def _possible(bundle: Any, guidance: GuidanceConfig) -> GuidanceConfig:
    """The guidance that the bundle has networks for; says what is left out."""
    if "discriminator" in bundle.nets or not (guidance.dg_weight or guidance.dg_weight_2nd):
        return guidance
    click.echo(f"bundle {bundle.name} has no discriminator network: exporting without discriminator guidance", err=True)
    return replace(guidance, dg_weight=0.0, dg_weight_2nd=0.0)


if __name__ == "__main__":
    main()
