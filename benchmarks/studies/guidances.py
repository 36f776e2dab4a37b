"""python -m benchmarks.studies.guidances: every guidance on mnist32 by its weight, fidelity against coverage.

Draws the same seeds and labels with each guidance at growing weights, judges them against held-out digits as `dgfast
evaluate` does, and prints a table and a picture. Guidances that pull toward something else than the data, such as an
observation, are not in it. The same command goes on where it was; `--only NAME` draws one guidance's row anew.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.studies.quality import judged
from dgfast.extras import require

GRADIENTS: dict[str, tuple[str, ...]] = {
    "discriminator": ("--dg-weight 4", "--dg-weight 8", "--dg-weight 12"),
    "classifier": ("--classifier-scale 0.5", "--classifier-scale 1", "--classifier-scale 2", "--classifier-scale 4"),
    "predicted clean": ("--fidelity 1", "--fidelity 3"),
    "low density": ("--diversity 0.5", "--diversity 1"),
    "autoguidance": ("--autoguidance 1.15", "--autoguidance 1.3", "--autoguidance 1.5"),
    "discriminator 8 + autoguidance": ("--dg-weight 8 --autoguidance 1.15", "--dg-weight 8 --autoguidance 1.3"),
    "PAG": ("--pag-scale 0.5", "--pag-scale 1", "--pag-scale 2"),
    "SEG": ("--seg-scale 0.5", "--seg-scale 1", "--seg-scale 2"),
    "SLG": ("--slg-scale 0.1", "--slg-scale 0.3", "--slg-scale 1"),
}
"""Guidances by a second network, a gradient or a perturbed self: options of growing weight."""
MIXES: dict[str, tuple[str, ...]] = {
    "CFG": ("--cfg-scale 1.5", "--cfg-scale 2", "--cfg-scale 3", "--cfg-scale 5"),
    "CFG in (0.2, 5]": ("--cfg-scale 2 --guidance-interval 0.2,5", "--cfg-scale 5 --guidance-interval 0.2,5"),
    "APG": ("--apg-scale 2", "--apg-scale 3", "--apg-scale 5"),
    "CFG++": ("--cfgpp-scale 0.3", "--cfgpp-scale 0.6", "--cfgpp-scale 1"),
    "TCFG": ("--tcfg-scale 2", "--tcfg-scale 3", "--tcfg-scale 5"),
    "FDG": tuple(f"--fdg-scale-high {high} --fdg-scale-low {low}" for high, low in ((2, 1.25), (3, 1.5), (5, 2))),
    "CFG-Zero*": ("--zero-star-scale 2", "--zero-star-scale 3", "--zero-star-scale 5"),
    "MAMBO-G": ("--mambo-scale 2", "--mambo-scale 5", "--mambo-scale 10"),
    "CFG 5, rescaled": ("--cfg-scale 5 --cfg-rescale 0.7",),
    "CFG 5, thresholded": ("--cfg-scale 5 --dynamic-threshold 0.995",),
    "CFG 5, norm limit": ("--cfg-scale 5 --renorm 1",),
    "CFG 5, pixel norm limit": ("--cfg-scale 5 --cfg-norm 1",),
}
"""Mixes of the predictions with and without class, and repairs of a strong one."""
METRICS = ("frechet", "precision", "recall", "density", "coverage")
_UNGUIDED = "unguided"
_MARKERS = "os^Dv<>P*XhH"
_REPAIRED, _REPAIRED_OPTION = "CFG 5, ", "--cfg-scale 5"
_SHOWN = 2.0  # Frechet distance up to which a point decides on the frame


@click.command(help=__doc__)
@click.option("--count", default=500, show_default=True, help="Images a setting: the seeds 0 to count - 1.")
@click.option("--steps", default=9, show_default=True, help="Of Heun: 17 calls where nothing is added.")
@click.option("--only", help="This guidance alone, beside no guidance.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for guidances.json and .png.")
def main(count: int, steps: int, only: str | None, out: Path) -> None:
    require("matplotlib", "torchmetrics", "prdc", "mlxtend")
    every = GRADIENTS | MIXES
    if only is not None and only not in every:
        raise click.UsageError(f"--only {only}: there are {', '.join(every)}")
    lines = {_UNGUIDED: ("",)} | {name: options for name, options in every.items() if only in (None, name)}
    settings = [(name, options) for name, weights in lines.items() for options in weights]
    folders = [out / "samples" / _folder(options) for _, options in settings]
    for number, (folder, (name, options)) in enumerate(zip(folders, settings, strict=True), 1):
        click.echo(f"{number} of {len(settings)}: {name} {options}", err=True)
        _draw(folder, options, count, steps)
    rows = _rows(folders, settings)
    (out / "guidances.json").write_text(json.dumps(rows, indent=1) + "\n")
    _plot(rows, out / "guidances.png")
    click.echo("| guidance | options | score calls | gradients | " + " | ".join(METRICS) + " |")
    click.echo("|---|---|" + "---:|" * (len(METRICS) + 2))
    for row in rows:
        cells = " | ".join(f"{row[metric]:.3f}" for metric in METRICS)
        click.echo(f"| {row['guidance']} | `{row['options']}` | {row['score']} | {row['gradients']} | {cells} |")


def _folder(options: str) -> str:
    return options.replace("--", "").replace(" ", "-") or _UNGUIDED


def _draw(folder: Path, options: str, count: int, steps: int) -> None:
    command = (
        f"-m dgfast.sample --out {shlex.quote(str(folder))} --seeds 0-{count - 1} --labels 0-9 --batch 100 "
        f"--steps {steps} --format npz --compile {'' if '--dg-weight' in options else '--dg-weight 0'} {options}"
    )
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def _rows(folders: list[Path], settings: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each setting: what it is, what it cost and how good its images are."""
    rows = []
    for folder, (name, options), metrics in zip(folders, settings, judged(folders, METRICS), strict=True):
        runs = json.loads((folder / "manifest.json").read_text())["runs"]
        run = next(run for run in reversed(runs) if run["images"])
        cost = {"score": run["score_evaluations"], "gradients": run["guidance_gradients"]}
        rows.append({"guidance": name, "options": options, **cost, **metrics})
    return rows


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Precision against coverage, a line from no guidance on with each weight that grows; far points lie outside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    unguided = rows[0]
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.5), layout="constrained", sharex=True, sharey=True)
    titles = ("gradients, second networks, perturbed selves", "mixes with and without class, and repairs")
    for axis, group, title in zip(axes, (GRADIENTS, MIXES), titles, strict=True):
        for number, name in enumerate(group):
            line = [row for row in rows if row["guidance"] == name]
            if not line:
                continue
            path_of_weights = [*_origin(name, rows), *line]
            marker, color = _MARKERS[number % len(_MARKERS)], f"C{number % 10}"
            axis.plot(
                [row["coverage"] for row in path_of_weights], [row["precision"] for row in path_of_weights],
                color=color, linewidth=1,
            )  # fmt: skip
            axis.plot(
                [row["coverage"] for row in line], [row["precision"] for row in line],
                marker, color=color, label=name, fillstyle="none" if number >= 10 else "full", markersize=6,
            )  # fmt: skip
        axis.plot([unguided["coverage"]], [unguided["precision"]], "k*", markersize=14, label=_UNGUIDED)
        axis.set(xlabel="coverage", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    for edge, metric in (("x", "coverage"), ("y", "precision")):
        values = [row[metric] for row in rows if row["frechet"] < _SHOWN]
        margin = 0.05 * (max(values) - min(values))
        axes[0].set(**{f"{edge}lim": (min(values) - margin, max(values) + margin)})
    axes[0].set_ylabel("precision")
    figure.savefig(path, dpi=110)


def _origin(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of weight 0: of a repair what it repairs; of CFG++ none, for it always guides."""
    if name == "CFG++":
        return []
    repaired = name.startswith(_REPAIRED)
    return [row for row in rows if row["options"] == _REPAIRED_OPTION] if repaired else rows[:1]


if __name__ == "__main__":
    main()
