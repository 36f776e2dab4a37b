"""Build one TensorRT engine of the guided step, its gradient inside.

Functions and guidances are those of `python -m dgfast.export.to_onnx`; what is not given is the bundle's own default.

DIR gets model.engine, engine.json (what it is, where it may run, whether it was ever executed), layers.md, report.md
and self_test.npz (values that the engine must reproduce whenever it is loaded). TensorRT for RTX builds on a machine
without a GPU; what can't be executed on this machine is said to be just that.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__" and not __package__:  # run by its path: no file here stands in for a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dgfast.errors import UserError
from dgfast.export import request
from dgfast.export.proof import TOLERANCES
from dgfast.export.request import Request
from dgfast.export.subject import Subject
from dgfast.extras import require
from dgfast.job_options import GuidedCommand
from dgfast.option_types import PATH
from dgfast.options import WHAT, Group, option
from dgfast.runtimes.onnx.file import files_of
from dgfast.runtimes.tensorrt.builder import HARDWARE, Built, Options, build, parse
from dgfast.runtimes.tensorrt.file import EXECUTED, EngineFile
from dgfast.runtimes.tensorrt.library import FLAVORS, find, layer_table

_Subjects = Callable[[Any], Subject] | None


class BatchRange(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.4 and newer
    """One batch size, or least,best,most."""

    name = "min,opt,max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = [int(part) for part in str(value).split(",")]
        except ValueError:
            sizes = []
        if len(sizes) not in (1, 3):
            self.fail(f"{value!r}: expected one batch size or three, such as 1,16,64", param, ctx)
        return (sizes[0], sizes[len(sizes) // 2], sizes[-1])


@click.command(cls=GuidedCommand, exported=True, help=__doc__)
@option("--bundle", group=Group.INPUT, help="Folder, or name of a bundle that comes along.")
@option("--onnx", group=Group.INPUT, type=PATH, help="A float32 file of `python -m dgfast.export.to_onnx` instead.")
@WHAT
@option("--batch", group=Group.OUTPUT, type=BatchRange(), default="1,16,64", help="Least, best and most images.")
@option("--dtype", group=Group.OUTPUT, type=click.Choice(list(TOLERANCES)), default="float32")
@option(
    "--keep-float32",
    group=Group.OUTPUT,
    multiple=True,
    help="Pattern of names of ONNX nodes that stay float32; repeatable.",
)
@option("--flavor", group=Group.RUNTIME, type=click.Choice(list(FLAVORS)), help="Default: whichever is installed.")
@option(
    "--timing-cache",
    group=Group.RUNTIME,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What earlier builds measured.",
)
@option("--refit", group=Group.OUTPUT, is_flag=True, help="Keep the weights exchangeable.")
@option("--version-compatible", group=Group.OUTPUT, is_flag=True, help="Let later versions of TensorRT load it.")
@option("--hardware-compatible", group=Group.OUTPUT, type=click.Choice(list(HARDWARE)), default="none")
@option(
    "--capability", group=Group.OUTPUT, multiple=True, help="Compute capability such as 8.9 to build for; repeatable."
)
@option(
    "--parse-only", group=Group.RUNTIME, is_flag=True, help="Stop when the library has read the file, without errors."
)
@option(
    "--out",
    group=Group.OUTPUT,
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder to write.",
)
def main(bundle: str | None, onnx: Path | None, dtype: str, flavor: str | None, out: Path, **given: Any) -> None:
    asked = _asked(bundle, onnx, given)
    name, trt = find(flavor)
    options = Options(
        batch=given["batch"], tf32=dtype == "tf32", refit=given["refit"],
        version_compatible=given["version_compatible"], hardware_compatible=given["hardware_compatible"],
        capabilities=given["capability"], timing_cache=given["timing_cache"],
    )  # fmt: skip
    options.check(name)
    request.make_folder(out)
    reference = _exported(asked, options.batch, out) if asked else Path(str(onnx))
    source = _in_type(reference, dtype, given["keep_float32"], out)
    if given["parse_only"]:
        count = parse(trt, source)
        click.echo(f"{source}: {trt.__name__} {trt.__version__} reads it: {count} layers, no error; nothing was built")
        return
    built_of(reference, source, dtype, options, name, trt, out, asked.subject if asked else None)


def built_of(
    reference: Path, source: Path, dtype: str, options: Options, name: str, trt: Any, out: Path,
    subject: _Subjects,
) -> None:  # fmt: skip
    """Build the engine of an ONNX file in that folder, execute it where that is possible, and say what is known of it.

    Args:
        reference: the float32 file. source: the one to build from. name, trt: the library, see `library.find`.
        subject: the function in eager PyTorch, for a device; None for a file alone.

    Raises:
        UserError, ParityError: the library refuses the file; or the engine is wrong, and gone.
    """
    built = build(trt, name, source, options)
    file = EngineFile(
        out, hashlib.sha256(built.plan).hexdigest(), name, trt.__version__, dtype, built.batch, TOLERANCES[dtype],
        capabilities=options.capabilities, hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible, refit=options.refit, source=_provenance(reference),
        never_because="; ".join(built.obstacles), **_gpu(),
    )  # fmt: skip
    _write(file, built, reference)
    _report(file, built, reference, subject)


def _asked(bundle: str | None, onnx: Path | None, given: dict[str, Any]) -> Request | None:
    """The function of a bundle that the options name; None for an ONNX file.

    Raises:
        UserError: neither or both, or options of a function beside a file that has one.
    """
    if (bundle is None) == (onnx is None):
        raise UserError("give either --bundle or --onnx")
    if bundle is not None:
        return request.read(bundle, given)
    if request.named(given):
        raise UserError(f"{onnx} has its function inside: leave out {request.spelled(request.named(given))}")
    return None


def _exported(asked: Request, batch: tuple[int, int, int], out: Path) -> Path:
    """The float32 ONNX file that TensorRT can build, proved equal to eager."""
    require("onnx", "onnxruntime")
    return asked.write(out, batch=batch[0] if batch[0] == batch[2] else None, target="tensorrt")


def _in_type(onnx: Path, dtype: str, keep_float32: tuple[str, ...], out: Path) -> Path:
    """The file to build from: the given one, or a copy with its products in half precision.

    Raises:
        UserError: it can't be read, or is in half precision already.
    """
    from dgfast.export.half_products import half_products, product_type
    from dgfast.runtimes.onnx.file import save

    product = product_type(_read(onnx, weights=False))
    if product != "float32":
        raise UserError(f"{onnx}: is in {product}; give the float32 file, of which --dtype makes every other")
    if dtype in ("float32", "tf32"):
        return onnx
    model, path = _read(onnx), out / f"model-{dtype}.onnx"
    half_products(model, dtype, keep_float32)
    save(model, path)
    return path


def _read(onnx: Path, *, weights: bool = True) -> Any:
    """The `onnx.ModelProto`; without weights, those that are in a file of their own are left there.

    Raises:
        UserError: it, or that file, can't be read.
    """
    import onnx as onnx_package

    try:
        onnx_package.checker.check_model(str(onnx))
        return onnx_package.load(onnx, load_external_data=weights)
    except Exception as error:  # protobuf's, onnx's and the system's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{onnx}: not a readable ONNX file ({reason})") from error


def _provenance(onnx: Path) -> dict[str, str]:
    """The hash of the file, with that of its weights if there is one, and whatever its exporter wrote into it."""
    digest = hashlib.sha256()
    for file in files_of(onnx):
        with file.open("rb") as opened:
            while chunk := opened.read(2**24):
                digest.update(chunk)
    written = {entry.key: entry.value for entry in _read(onnx, weights=False).metadata_props}
    return written | {"onnx": onnx.name, "onnx_sha256": digest.hexdigest()}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}


def _write(file: EngineFile, built: Built, reference: Path) -> None:
    """Write the engine and what stands beside it; a description never stands beside another engine than its own."""
    from dgfast.export import self_test
    from dgfast.runtimes.onnx.session import OnnxEngine

    least, _, most = file.batch
    onnx = OnnxEngine(reference)
    inputs = self_test.case(onnx, max(least, min(self_test.MOST, most))).inputs
    outputs = onnx(inputs)
    (file.folder / "engine.json").unlink(missing_ok=True)
    partial = file.folder / "model.engine.partial"
    partial.write_bytes(built.plan)
    os.replace(partial, file.path)
    self_test.save(file.self_test, inputs, outputs)
    (file.folder / "layers.md").write_text(layer_table(built.layers) + "\n")
    file.write()


def _report(file: EngineFile, built: Built, reference: Path, subject: _Subjects) -> None:
    """Execute the engine where that is possible, and say what is known of it.

    Raises:
        UserError, ParityError: it could be executed, and is wrong; then it is removed.
    """
    from dgfast.export import engine_report

    report, latency = None, ""
    if not built.obstacles:
        try:
            report, latency = _executed(file, reference, subject)
            report.check()
        except UserError:
            file.path.unlink()
            (file.folder / "engine.json").unlink()
            raise
        (file.folder / "parity.json").write_text(report.json() + "\n")
        file = replace(file, parity=EXECUTED, errors=report.worst)
        file.write()
    text = engine_report.summary(file, built, layer_table(built.layers), report, latency)
    (file.folder / "report.md").write_text(text)
    click.echo(text, nl=False)


def _executed(file: EngineFile, reference: Path, of: _Subjects) -> tuple[Any, str]:
    """Parity against eager, or for a given file against ONNX Runtime, and the latency table."""
    import torch

    from dgfast.devices import precision
    from dgfast.export import engine_report, self_test
    from dgfast.export.parity import compare
    from dgfast.runtimes.onnx.session import OnnxEngine
    from dgfast.runtimes.tensorrt.engine import load

    engine, onnx, device = load(file.folder), OnnxEngine(reference), torch.device("cuda")
    engine.self_test()
    sizes = list(dict.fromkeys(file.batch))
    if of is None:
        cases = [self_test.case(onnx, size, seed=1) for size in sizes]
        report = compare(onnx, engine, cases, file.tolerance)
        timed = {size: case.inputs for size, case in zip(sizes, cases, strict=True)}
        return report, engine_report.latency_table({"engine": engine}, timed, device)
    subject = of("cpu")
    cases = [case for size in {min(size, 8) for size in sizes} for case in subject.cases(size)]
    report = compare(subject, engine, cases, file.tolerance)
    timed = {size: subject.example(size, seed=3) for size in sizes}
    with precision("float32"):
        return report, engine_report.against_eager(engine, of(device), timed, device)


if __name__ == "__main__":
    main()
