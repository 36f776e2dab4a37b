"""Pictures by matplotlib, in one style, as bytes that a page can hold."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9")
"""Told apart by people who see few colours too (Okabe and Ito); with a marker of its own each."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e5e5e5", "legend.frameon": False, "svg.hashsalt": "dgfast",
    "axes.edgecolor": "#888888", "figure.facecolor": "white",
}  # fmt: skip
_DPI = 150


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: of its file. title, alt: beside it, and in its place.
        png: as a file. svg: what the page shows, if it has one. pixels: it is made of pixels that are to be seen.
        width: in pixels of the page, at most.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: bytes | None = None
    pixels: bool = False
    width: int | None = None


def picture(
    name: str, title: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None], raster: bool = False
) -> Picture:
    """What `draw` draws on a figure of that size, in inches.

    Args:
        raster: images make up most of it, so that the page shows the PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page has the name as text
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        kinds = {}
        for kind in ("png",) if raster else ("png", "svg"):
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
            kinds[kind] = file.getvalue()
    return Picture(name, title, alt, kinds["png"], kinds.get("svg"), width=round(96 * size[0]))


def logarithmic(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Make the axis "x" or "y" logarithmic, with a tick at round numbers around the values, in plain digits."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positive = [value for value in values if value > 0]
    low, high = min(positive), max(positive)
    decades = math.log10(high / low)
    digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    margin = 10 ** (0.08 * max(decades, 0.5))
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / margin, high * margin)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def label_points(
    figure: Figure,
    axes: Axes,
    points: Iterable[tuple[float, float, str]],
    lines: Iterable[tuple[float, float, float, float]] = (),
) -> None:
    """Write a text beside each point (x, y), where it covers neither a point nor another text, nor a line if it can.

    Args:
        lines: x and y of both ends; they are horizontal or vertical.
    """
    points = list(points)
    figure.draw_without_rendering()  # only then is it known where the points lie
    scale, frame = figure.dpi / 72, axes.get_window_extent()
    places = [_pixels(axes, x, y) for x, y, _ in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in places]
    drawn = [_around(_pixels(axes, x0, y0), _pixels(axes, x1, y1), 2 * scale) for x0, y0, x1, y1 in lines]
    for (x, y, text), place in zip(points, places, strict=True):
        boxes = [_box(place, dx * scale, dy * scale, 5.2 * scale * len(text), 11 * scale) for dx, dy in _OFFSETS]
        outside = [b[0] < frame.x0 or b[2] > frame.x1 or b[1] < frame.y0 or b[3] > frame.y1 for b in boxes]
        costs = [
            20 * out + 5 * sum(_meet(box, other) for other in taken) + sum(_meet(box, line) for line in drawn)
            for box, out in zip(boxes, outside, strict=True)
        ]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        dx, dy = _OFFSETS[best]
        note = axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset points", fontsize=8, va="center",
            ha="center" if not dx else "left" if dx > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6} if abs(dy) > _LINE else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )  # fmt: skip
        note.set_in_layout(False)


_LINE = 12  # points from one line of text to the next
_OFFSETS = tuple(
    (dx, sign * line * _LINE)
    for line in range(6)
    for sign in (1, -1)
    for dx in (8, -8, 0)
    if (dx or line) and (line or sign > 0)
)
_Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""


def _box(place: tuple[float, float], dx: float, dy: float, width: float, height: float) -> _Box:
    """Of a text at that offset from a place."""
    left = place[0] + dx - (width / 2 if not dx else 0 if dx > 0 else width)
    return left, place[1] + dy - height / 2, left + width, place[1] + dy + height / 2


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def _around(one: tuple[float, float], two: tuple[float, float], margin: float) -> _Box:
    (x0, y0), (x1, y1) = one, two
    return min(x0, x1) - margin, min(y0, y1) - margin, max(x0, x1) + margin, max(y0, y1) + margin


def _meet(one: _Box, two: _Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
