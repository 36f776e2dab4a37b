"""What a page is made of, written without drawing or measuring anything."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.manifest import Manifest, recorded
from dgfast.outputs import write_images
from dgfast.ranges import Ranges

HOSTILE = "<script>alert(1)</script>&\"'$x_{$"
"""Markup, quotes, and what matplotlib would take for a formula."""


def run_folder(
    path: Path, seeds: str = "0-15", guidance: GuidanceConfig | None = None, steps: int = 18, side: int = 8,
    seconds: float | None = 4.0, runtime: str = "eager", label: int = 3, device: str = "cpu",
) -> Path:  # fmt: skip
    """A folder of `dgfast sample` with images of noise; of the one-step generator without guidance."""
    numbers = Ranges.parse(seeds)
    images = np.random.default_rng(numbers[0]).integers(0, 256, (len(numbers), side, side, 1), dtype=np.uint8)
    write_images(path, images, numbers, np.full(len(numbers), label))
    method: dict[str, Any] = {"one_step": True}
    if guidance is not None:
        method = {"sampling": asdict(SamplingConfig(num_steps=steps)), "guidance": recorded(guidance)}
    manifest = Manifest(path, {**method, "seeds": seeds, "runtime": runtime, "dtype": "float32"}, len(numbers))
    manifest.begin({"device": device, "processes": 1, "versions": {"dgfast": "0.1.0", "torch": "9.9"}})
    timed = {} if seconds is None else {"images": len(numbers), "seconds": seconds, "runtime": runtime}
    manifest.end(outcome="complete", **timed)
    manifest.products = {}
    manifest.save()
    return path


def evaluation(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of `dgfast evaluate --json`."""
    content = {
        "format": "dgfast-evaluation-1", "reference": {"name": "digits held out", "images": 1000},
        "features": "a small classifier", "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def judged(name: str, folder: str | None, frechet: float, images: int = 16, **more: Any) -> dict[str, Any]:
    """A row of it, whose interval reaches a tenth to both sides."""
    value = {"value": frechet, "low": 0.9 * frechet, "high": 1.1 * frechet}
    metrics = {"frechet": value, "precision": {"value": 0.8125, "low": None, "high": None}}
    return {
        "name": name,
        "folder": folder,
        "images": images,
        "seeds": "0-15",
        "metrics": metrics,
        "settings": {},
        **more,
    }


def noise_errors(path: Path) -> Path:
    """The results.json of `python -m benchmarks.gpu`."""
    rows = [
        {f"sigma, error of the {of}": sigma, "eager float32": 0.0, "compiled bf16": 0.01 * (1 + sigma)}
        for of, sigmas in (("call", (80.0, 0.5)), ("state", (0.5, 0.0)))
        for sigma in sigmas
    ]
    facts = [{"fact": "device", "value": "a GPU"}, {"fact": "triton", "value": "None"}]
    parts = {"environment": {"status": "ok", "rows": facts}, "parity by noise level": {"status": "ok", "rows": rows}}
    path.write_text(json.dumps({"parts": parts}))
    return path


def clipped(figure: Figure) -> list[str]:
    """The texts that reach over the edge of the figure, as matplotlib itself measures them."""
    figure.draw_without_rendering()
    edge = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    return [
        text for text, box in boxes
        if min(box.x0 - edge.x0, box.y0 - edge.y0, edge.x1 - box.x1, edge.y1 - box.y1) < -1
    ]  # fmt: skip


def _texts(figure: Figure) -> Iterator[Text]:
    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        axis = next((axis for axis in axes if text in axis.get_ticklabels()), None)
        if text.get_text() and text.get_visible() and (axis is None or _is_drawn(text, axis)):
            yield text


def _is_drawn(text: Text, axis: Any) -> bool:
    """An axis keeps labels of ticks beyond its ends, which it does not draw."""
    low, high = sorted(axis.get_view_interval())
    return bool(low <= text.get_position()[0 if axis is axis.axes.xaxis else 1] <= high)
