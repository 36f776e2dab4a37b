"""python -m benchmarks.studies.reuse: what reusing the discriminator's gradient saves, and what it costs.

Draws the same seeds of mnist32 with the gradient computed at every call, at every second call and so on, all compiled,
and prints for each the gradients an image, the seconds, how far the images end from those of the first row, and their
quality.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import dgfast
from benchmarks.studies.quality import judged
from dgfast import bundle as bundles
from dgfast.extras import require
from dgfast.outputs import to_uint8, write_images
from dgfast.sampler import Sampler

EVERY = (1, 2, 3, 5)
QUALITY = ("frechet", "precision", "recall", "log_ratio")


@click.command(help=__doc__)
@click.option("--count", default=400, show_default=True, help="Images a row: the seeds 0 to count - 1.")
@click.option("--batch", default=100, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for reuse.json and reuse.png.")
def main(count: int, batch: int, out: Path) -> None:
    require("matplotlib", "torchmetrics", "prdc", "mlxtend")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = _measure(count, batch, Path(scratch))
    (out / "reuse.json").write_text(json.dumps(rows, indent=1) + "\n")
    _plot(rows, out / "reuse.png")
    columns = list(rows[0])
    click.echo("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        click.echo("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def _measure(count: int, batch: int, scratch: Path) -> list[dict[str, Any]]:
    """One row for no guidance, and one for each way of reusing."""
    bundle = bundles.read("mnist32")
    networks = dgfast.load(bundle)
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    settings = [(every, reuse) for every in EVERY for reuse in (("hold",) if every == 1 else ("hold", "linear"))]
    for every, reuse in [*settings, (0, "unguided")]:
        weights = {"dg_every": every, "dg_reuse": reuse} if every else {"dg_weight": 0.0}
        sampler = Sampler(networks, bundle.sampling, replace(bundle.guidance, **weights), runtime="compiled")
        sampler.prepare(batch)
        began = time.perf_counter()
        parts = [sampler(range(start, min(start + batch, count))) for start in range(0, count, batch)]
        seconds = time.perf_counter() - began
        images = torch.cat(parts)
        exact = images if exact is None else exact
        folder = scratch / f"{every}-{reuse}"
        labels = sampler.draw_labels(range(count))
        write_images(folder, to_uint8(images), range(count), None if labels is None else labels.numpy())
        rows.append(
            {
                "every": every,
                "reuse": reuse,
                "gradients": sampler.guidance_gradients,
                "seconds": seconds,
                "relative_error": float((images - exact).norm() / exact.norm()),
            }
        )
    folders = [scratch / f"{row['every']}-{row['reuse']}" for row in rows]
    return [row | quality for row, quality in zip(rows, judged(folders, QUALITY), strict=True)]


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, name in zip(axes, ("relative_error", "frechet"), strict=True):
        for reuse in ("hold", "linear"):
            line = [row for row in rows if row["reuse"] == reuse or row["every"] == 1]
            axis.plot([row["gradients"] for row in line], [row[name] for row in line], "o-", label=reuse)
        unguided = next(row for row in rows if row["reuse"] == "unguided")
        axis.plot([0], [unguided[name]], "ks", label="unguided")
        axis.set(xlabel="discriminator gradients an image", ylabel=name.replace("_", " "))
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
