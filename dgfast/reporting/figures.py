"""The pictures of a page: what is drawn, of numbers that others measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dgfast.reporting.evaluation import DISTANCE, Evaluation
from dgfast.reporting.markup import writable
from dgfast.reporting.noise_errors import NoiseErrors
from dgfast.reporting.plotting import COLOURS, MARKERS, Picture, label_points, logarithmic, picture
from dgfast.reporting.timings import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dgfast.reporting.trajectory import Trajectory

_COLUMNS = 9  # noise levels whose images are shown
_GAP = 2  # pixels between images
_WIDTH = 9.0  # inches


# Quality and speed ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """A run in the plane of quality and speed.

    Attributes:
        label: what tells it from others of its method. interval: of the distance, or None.
    """

    label: str
    method: str
    machine: str
    images_per_second: float
    distance: float
    interval: tuple[float, float] | None


def front(points: Sequence[Point]) -> list[Point]:
    """Those for which no other point is as fast and as good, and better in one of the two; the slowest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.images_per_second, point.distance)):
        if not best or point.distance < best[-1].distance:
            best.append(point)
    return best[::-1]


def quality_and_speed(name: str, points: Sequence[Point], alt: str) -> Picture:
    """The points, with a colour a method, and the front of each machine."""
    methods = list(dict.fromkeys(point.method for point in points))
    fronts = [
        front([p for p in points if p.machine == machine]) for machine in dict.fromkeys(p.machine for p in points)
    ]
    intervals = [(p.images_per_second, *(p.interval or (p.distance, p.distance))) for p in points]
    lines = [(x, low, x, high) for x, low, high in intervals]
    for ends in fronts:  # steps up, then to the right: what the slower one of two reaches, at its own speed alone
        for a, b in pairwise(ends):
            lines += [
                (a.images_per_second, a.distance, a.images_per_second, b.distance),
                (a.images_per_second, b.distance, b.images_per_second, b.distance),
            ]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for ends in fronts:
            line = [point.images_per_second for point in ends], [point.distance for point in ends]
            axes.plot(*line, color="#888888", linewidth=1, linestyle="--", drawstyle="steps-pre", zorder=1)
        for k, method in enumerate(methods):
            members = [k for k, point in enumerate(points) if point.method == method]
            x, y = [points[k].images_per_second for k in members], [points[k].distance for k in members]
            lows, highs = ([abs(intervals[k][end] - points[k].distance) for k in members] for end in (1, 2))
            axes.errorbar(
                x, y, [lows, highs], fmt=MARKERS[k % len(MARKERS)], capsize=3, label=method,
                color=COLOURS[k % len(COLOURS)], markersize=6, elinewidth=1,
            )  # fmt: skip
        logarithmic(axes, "x", [point.images_per_second for point in points])
        axes.margins(y=0.15)
        axes.set_xlabel("images a second (logarithmic; right is faster)")
        axes.set_ylabel("Frechet distance (lower is better)")
        figure.legend(loc="outside upper center", ncols=_columns(methods))
        label_points(figure, axes, [(p.images_per_second, p.distance, p.label) for p in points], lines)

    return picture(name, "Quality against speed", alt, (_WIDTH, 4.8), draw)


def distances(name: str, evaluation: Evaluation, alt: str) -> Picture:
    """The distance of each row, with its interval."""
    rows = [row for row in evaluation.rows if DISTANCE in row.metrics]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, row in enumerate(rows):
            value = row.metrics[DISTANCE]
            colour = COLOURS[0] if row.folder is None else COLOURS[1]
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [k, k], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(value.value, k, marker="o", color=colour)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("Frechet distance (left is better)")

    return picture(name, "Frechet distance", alt, (_WIDTH, 0.9 + 0.3 * len(rows)), draw)


# Trajectories ---------------------------------------------------------------------------------------------------------
def predictions(name: str, trajectory: Trajectory, alt: str) -> Picture:
    """Predicted clean images at some noise levels, two rows a seed: without and with guidance."""
    steps = len(trajectory.sigmas)
    columns = np.unique(np.linspace(0, steps, min(_COLUMNS, steps + 1)).round().astype(int))
    levels = [*(f"{sigma:.3g}" for sigma in trajectory.sigmas), "image"]
    _, seeds, height, width, channels = trajectory.guided.shape
    pitch = height + _GAP
    sheet = np.full((seeds * (2 * pitch + 2 * _GAP), len(columns) * (width + _GAP), channels), 255, np.uint8)
    rows, names = [], []
    for seed in range(seeds):
        for k, (word, images) in enumerate((("without", trajectory.unguided), ("with", trajectory.guided))):
            y = seed * (2 * pitch + 2 * _GAP) + k * pitch
            for place, column in enumerate(columns):
                x = place * (width + _GAP)
                sheet[y : y + height, x : x + width] = images[column, seed]
            rows.append(y + height / 2 - 0.5)
            names.append(f"seed {trajectory.seeds[seed]}, {word}")

    left, top = 0.2 + 0.075 * max(map(len, names)), 0.5  # inches for what stands beside the images
    tall = (_WIDTH - left) * sheet.shape[0] / sheet.shape[1] + top

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")  # which does not know that images keep their shape
        axes = figure.add_axes((left / _WIDTH, 0, 1 - left / _WIDTH, 1 - top / tall))
        axes.imshow(sheet.squeeze(-1) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_xticks(
            [k * (width + _GAP) + width / 2 - 0.5 for k in range(len(columns))], [levels[c] for c in columns]
        )
        axes.set_yticks(rows, names)
        axes.xaxis.tick_top()
        axes.set_xlabel("noise level sigma")
        axes.xaxis.set_label_position("top")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    return picture(name, "Predicted clean images along the run", alt, (_WIDTH, tall), draw, raster=True)


def corrections(name: str, trajectory: Trajectory, alt: str) -> Picture:
    """How much the guidances add, where the two runs go apart, and what the discriminator says."""
    judged = bool(np.isfinite(trajectory.log_ratios).any())
    panels = [
        ("|correction|, root mean square", trajectory.corrections),
        ("between guided and unguided", trajectory.distances[:-1]),
        *([("log-ratio of the discriminator", trajectory.log_ratios)] if judged else []),
    ]

    def draw(figure: Figure) -> None:
        for axes, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            _along(axes, trajectory, values)
            axes.set_title(title)
        for axes in figure.axes[:2]:
            axes.set_ylim(bottom=0)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return picture(name, "What guidance changes along the run", alt, (_WIDTH, 3.3), draw)


def _along(axes: Axes, trajectory: Trajectory, values: np.ndarray) -> None:
    """A line a seed, from the highest noise level to the lowest."""
    for k, line in enumerate(values.T):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        axes.plot(
            trajectory.sigmas, line, color=colour, linewidth=1, marker=marker, markersize=3,
            label=f"seed {trajectory.seeds[k]}",
        )  # fmt: skip
    logarithmic(axes, "x", trajectory.sigmas)
    axes.invert_xaxis()
    axes.set_xlabel("sigma")


# Errors and times -----------------------------------------------------------------------------------------------------
def noise_errors(name: str, errors: NoiseErrors, alt: str) -> Picture:
    """Error by noise level, a line a runtime and number format; an error of 0 lies on the bottom line."""
    positive = [error for column in errors.errors.values() for error in column if error > 0]
    sigmas = [sigma for sigma in errors.sigmas if sigma > 0]
    least = min(sigmas)
    bottom = 10.0 ** (math.floor(math.log10(min(positive, default=1e-7))) - 1)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, (label, column) in enumerate(errors.errors.items()):
            x = [sigma or least / 3 for sigma in errors.sigmas]
            axes.plot(
                x, [error or bottom for error in column], color=COLOURS[k % len(COLOURS)], label=label,
                marker=MARKERS[k % len(MARKERS)], markersize=max(9 - 1.5 * k, 4), linewidth=1.2,
            )  # fmt: skip
        images = [least / 3] * (0.0 in errors.sigmas)
        logarithmic(axes, "x", [*sigmas, *images])
        logarithmic(axes, "y", [bottom, *positive, 100 * bottom])
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == bottom else f"{value:.0e}")
        axes.invert_xaxis()
        axes.set_xlabel("noise level sigma" + (" (rightmost: the finished images)" if images else ""))
        axes.set_ylabel("relative error")
        figure.legend(loc="outside upper center", ncols=_columns(errors.errors))

    return picture(name, f"Error of the {errors.of} by noise level", alt, (_WIDTH, 3.8), draw)


def speed_ups(name: str, rows: Sequence[Row], alt: str) -> Picture:
    """Speed-up over eager of every row that has one, as bars."""
    drawn = [row for row in rows if "speedup" in row]
    groups = list(dict.fromkeys(row["group"] for row in drawn))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, group in enumerate(groups):
            places = [k for k, row in enumerate(drawn) if row["group"] == group]
            widths = [drawn[k]["speedup"] for k in places]
            bars = axes.barh(places, widths, color=COLOURS[(i + 1) % len(COLOURS)], label=group)
            axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set_yticks(range(len(drawn)), [_short(row["name"]) for row in drawn])
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times as fast as eager, in the same run")
        axes.margins(x=0.1)  # room for the labels
        figure.legend(loc="outside upper right", ncols=_columns(groups))

    return picture(name, "Speed-up over eager", alt, (_WIDTH, 1.2 + 0.3 * len(drawn)), draw)


def _columns(names: Iterable[str]) -> int:
    """Of a legend with these names, so that it is not wider than the figure."""
    return max(1, min(4, 110 // (max(map(len, names)) + 8)))


def _short(text: str, most: int = 48) -> str:
    text = writable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
