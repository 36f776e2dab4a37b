"""python -m benchmarks.studies.formats: what number formats below float32 do to the images of mnist32.

Draws the same seeds in float32, in bfloat16 and through the ONNX file of `export/to_onnx.py --dtype fp16`, and prints
how far each image ends from float32's and the quality of each set. The last row is float32 with other seeds: what
differs less from the first row than that one does is noise. On a CPU the file is run with the roundings of a GPU.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import dgfast
from benchmarks.studies.quality import judged
from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.devices import keep_freed_memory, pick_device
from dgfast.engines import runtime_of
from dgfast.export.half_products import half_products, round_on_a_cpu, wide_products
from dgfast.export.joint_graph import joint
from dgfast.outputs import to_uint8, write_images
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.sampler import Sampler

QUALITY = ("frechet", "kernel", "precision", "recall", "log_ratio")
OTHER_SEEDS = "float32, other seeds"
_PIXEL_RANGE = 2.0


@click.command(help=__doc__)
@click.option("--count", default=500, show_default=True, help="Images a format: the seeds 0 to count - 1.")
@click.option("--batch", default=50, show_default=True)
@click.option("--device", help="default: CUDA where there is one")
def main(count: int, batch: int, device: str | None) -> None:
    at = pick_device(device)
    if at.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        rows = _measure(bundles.read("mnist32"), at, count, batch, Path(scratch))
    columns = list(rows[0])
    click.echo("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        click.echo("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def _measure(bundle: Bundle, at: torch.device, count: int, batch: int, scratch: Path) -> list[dict[str, Any]]:
    makes: dict[str, Callable[[], Sampler]] = {
        "float32": partial(_eager, bundle, at, torch.float32),
        "bf16": partial(_eager, bundle, at, torch.bfloat16),
        "fp16 file": partial(_file, bundle, at, scratch),
        OTHER_SEEDS: partial(_eager, bundle, at, torch.float32),
    }
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    for name, make in makes.items():
        first = count if name == OTHER_SEEDS else 0
        sampler, began = make(), time.perf_counter()
        parts = [sampler(range(first + k, first + min(k + batch, count))).float().cpu() for k in range(0, count, batch)]
        seconds, images = time.perf_counter() - began, torch.cat(parts)
        exact = images if exact is None else exact
        labels = sampler.draw_labels(range(first, first + count))
        assert labels is not None
        write_images(scratch / name, to_uint8(images), range(count), labels.numpy())
        drift = {"median drift": "", "largest drift": ""} if first else _drift(images, exact)
        rows.append({"format": name, "seconds": round(seconds), **drift})
        click.echo(f"{name}: {seconds:.0f} s", err=True)
    quality = judged([scratch / name for name in makes], QUALITY)
    return [row | metrics for row, metrics in zip(rows, quality, strict=True)]


def _eager(bundle: Bundle, at: torch.device, dtype: torch.dtype) -> Sampler:
    return Sampler(dgfast.load(bundle, at, dtype), bundle.sampling, bundle.guidance, at)


def _file(bundle: Bundle, at: torch.device, scratch: Path) -> Sampler:
    networks, path = dgfast.load(bundle), scratch / "fp16.onnx"
    subject = joint(networks, bundle.sampling, bundle.guidance)
    model = convert(subject.function, dict(subject.example(2, seed=1)), subject.outputs, dynamic=True)
    half_products(model, "fp16")
    wide_products(model)
    if at.type == "cpu":
        round_on_a_cpu(model)
    save(model, path)
    return Sampler(networks, bundle.sampling, bundle.guidance, at, runtime_of(OnnxEngine(path, at)))


def _drift(images: Tensor, exact: Tensor) -> dict[str, Any]:
    """Of the worst pixel of an image, as a share of the pixel range: in the median image, and in the worst."""
    worst = (images.double() - exact.double()).abs().flatten(1).amax(1) / _PIXEL_RANGE
    return {"median drift": float(worst.median()), "largest drift": float(worst.max())}


if __name__ == "__main__":
    main()
