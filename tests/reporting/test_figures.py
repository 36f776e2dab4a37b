"""Pictures: what is on the front of quality and speed, and that every text can be read."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from dgfast.reporting.figures import Point, front, predictions, quality_and_speed
from dgfast.reporting.plotting import logarithmic
from dgfast.reporting.trajectory import Trajectory
from tests.support.reporting import clipped

_NUMBERS = st.integers(1, 6).map(float)


def _point(speed: float, distance: float, label: str = "1: 18 heun, eager", method: str = "unguided") -> Point:
    return Point(label, method, "cpu", speed, distance, (0.9 * distance, 1.1 * distance))


@settings(max_examples=50)
@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=1, max_size=12))
def test_front_holds_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    best = [(p.images_per_second, p.distance) for p in front([_point(*pair) for pair in pairs])]
    beaten = {a for a in pairs for b in pairs if b[0] >= a[0] and b[1] <= a[1] and b != a}
    assert best == sorted({*pairs} - beaten)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    figures = list[Figure]()

    def keeping(figure: Figure, *arguments: Any, **keywords: Any) -> None:
        figures.extend([figure] if figure not in figures else [])

    monkeypatch.setattr(Figure, "savefig", keeping)
    return figures


@pytest.mark.parametrize("seeds", [1, 8])
@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 16, 3)])
def test_predictions_show_the_images_and_clip_no_text(
    seeds: int, shape: tuple[int, int, int], saved: list[Figure]
) -> None:
    rng, steps = np.random.default_rng(0), 18
    images = rng.integers(0, 256, (2, steps + 1, seeds, *shape), dtype=np.uint8)
    zeros = np.zeros((steps, seeds))
    levels, numbers = np.geomspace(80, 0.002, steps), np.arange(seeds) + 2**31
    trajectory = Trajectory(levels, images[0], images[1], zeros, zeros, numbers, numbers, {})
    predictions("p", trajectory, "alt")
    (figure,) = saved
    assert clipped(figure) == []
    sheet = np.atleast_3d(np.asarray(figure.axes[0].images[0].get_array()))
    height, width, _ = shape
    top = len(sheet) - 2 * 2 - (height + 2)  # the last seed's second row is the guided run
    assert np.array_equal(sheet[top : top + height, -(width + 2) : -2], images[0][-1, -1])


def test_labels_of_near_points_cover_neither_each_other_nor_the_points(saved: list[Figure]) -> None:
    points = [_point(4 + 0.05 * k, 0.3 + 0.002 * k, f"{k}: 18 heun, eager", f"method {k % 3}") for k in range(5)]
    quality_and_speed("q", [*points, _point(500, 0.5)], "alt")
    (figure,) = saved
    figure.draw_without_rendering()
    notes = [note for note in figure.axes[0].texts if isinstance(note, Annotation)]
    boxes = [Text.get_window_extent(note) for note in notes]  # without the line to its point
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    places = figure.axes[0].transData.transform([(p.images_per_second, p.distance) for p in points])
    assert not any(box.contains(x, y) for box in boxes for x, y in places)


@pytest.mark.parametrize("values", [[3.9], [1.4, 580.0], [0.002, 80.0], [4.0, 4.2], [1e-8, 1e3]])
def test_logarithmic_axis_has_a_few_round_ticks_around_its_values(values: list[float]) -> None:
    axes = Figure().add_subplot()
    logarithmic(axes, "x", values)
    low, high = axes.get_xlim()
    ticks = [float(tick) for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high]
    assert low < min(values) and max(values) < high and 1 <= len(ticks) <= 13
    digits = {round(tick / 10 ** math.floor(math.log10(tick) + 1e-9), 6) for tick in ticks}
    assert digits <= {1, 1.5, 2, 3, 4, 5, 6, 8}
