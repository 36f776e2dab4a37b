"""The sections of a page: what they say in words and tables, and which pictures stand in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dgfast.outputs import grid_png
from dgfast.ranges import Ranges
from dgfast.reporting import figures, timings
from dgfast.reporting.evaluation import DISTANCE, Evaluation, Judged, Value, run_of
from dgfast.reporting.markup import Html, table, tag
from dgfast.reporting.noise_errors import NoiseErrors
from dgfast.reporting.plotting import Picture
from dgfast.reporting.runs import Run, Shown, changed, side_by_side
from dgfast.reporting.trajectory import Trajectory


@dataclass
class Section:
    """A part of the page under a heading: `Html` and pictures, in order."""

    anchor: str
    title: str
    parts: list[Html | Picture | list[Picture]] = field(default_factory=list)


def paragraph(*words: str, note: bool = False) -> Html:
    return tag("p", *words, class_="note") if note else tag("p", *words)


# Runs -----------------------------------------------------------------------------------------------------------------
def runs(all_runs: Sequence[Run]) -> Section:
    headings = [
        "folder", "method", "settings", "steps", "images", "seeds", "runtime", "calls an image", "images/s", "machine",
    ]  # fmt: skip
    rows = [_run_row(number, run) for number, run in enumerate(all_runs, start=1)]
    text = paragraph(
        "What each folder's manifest says. Settings are those of sampling and guidance that differ from dgfast's "
        "defaults; images/s is of the drawing alone, without compiling."
    )
    of_versions: dict[str, list[str]] = {}
    for number, run in enumerate(all_runs, start=1):
        versions = run.facts.get("versions")
        said = described(versions) if isinstance(versions, dict) else "unknown"
        of_versions.setdefault(said, []).append(str(number))
    known = "; ".join(f"{said} (runs {', '.join(numbers)})" for said, numbers in of_versions.items())
    runs_table = table("Runs with their settings", headings, rows)
    return Section("runs", "Runs", [text, runs_table, paragraph(f"Versions: {known}.")])


def _run_row(number: int, run: Run) -> list[str]:
    facts, job, speed = run.facts, run.job, run.speed
    calls = [(facts.get("score_evaluations"), "score"), (facts.get("guidance_gradients"), "gradients")]
    return [
        f"{number}. {run.name}", run.method, described(run.settings) or "none", run.steps,
        f"{run.images:,}" + ("" if run.complete else ", not all drawn yet"), _short(str(job.get("seeds"))),
        f"{job.get('runtime')}, {job.get('dtype')}",
        "1 generator" if job.get("one_step") else ", ".join(f"{count} {word}" for count, word in calls if count),
        f"{timings.number(speed.images_per_second)} (in {speed.seconds:.1f} s)" if speed else run.no_speed,
        speed.machine if speed else "",
    ]  # fmt: skip


def described(settings: dict[str, Any]) -> str:
    """Settings as one text: cfg_scale 2, dg_window 0.01 to 1."""
    texts = []
    for name, value in settings.items():
        said = " to ".join(map(str, value)) if isinstance(value, list) else str(value)
        texts.append(f"{name} {_short(said)}")
    return ", ".join(texts)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


# Images ---------------------------------------------------------------------------------------------------------------
def grids(all_shown: Sequence[tuple[Run, Shown | None]]) -> Section:
    section = Section("images", "Images on equal seeds")
    groups = side_by_side([shown for _, shown in all_shown if shown is not None])
    if groups:
        section.parts.append(
            paragraph("Images at the same place have the same seed and class; what differs is how they were drawn.")
        )
    for group in groups:
        if why := group[0].unlike(groups[0][0]):
            names = ", ".join(shown.run.name for shown in group)
            text = f"{names}: not to be compared image by image with {groups[0][0].run.name}: {why}."
            section.parts.append(paragraph(text, note=True))
        offset = sum(isinstance(part, list) and len(part) for part in section.parts)
        section.parts.append([_grid(offset + k, shown) for k, shown in enumerate(group, start=1)])
    for run, shown in all_shown:
        if shown is None:
            section.parts.append(paragraph(f"{run.name} keeps no images that can be looked at.", note=True))
    return section


def _grid(number: int, shown: Shown) -> Picture:
    seeds = Ranges.of(shown.seeds)
    title = f"{number}. {shown.run.name}: {shown.run.method}, {shown.run.steps}"
    alt = f"{len(seeds)} images drawn into {shown.run.name} with {shown.run.method}, row by row, of the seeds {seeds}"
    return Picture(f"grid-{number}", title, alt, grid_png(shown.images), pixels=True)


def trajectories(recorded: Sequence[Trajectory]) -> Section:
    section = Section("trajectories", "Guided and unguided trajectories")
    section.parts.append(
        paragraph(
            "Two runs from equal seeds. The correction is what the guidances add to the predicted clean image at each "
            "step, as root mean square over its numbers, where images span -1 to 1."
        )
    )
    for k, one in enumerate(recorded, start=1):
        settings = changed(one.about.get("sampling") or {}, one.about.get("guidance") or {})
        section.parts.append(tag("h3", f"{one.about.get('bundle')}: {described(settings)}"))
        peaks = one.corrections.mean(axis=1)
        top = int(peaks.argmax())
        seeds = Ranges.of(one.seeds.tolist())
        section.parts += [
            figures.predictions(
                f"trajectories-{k}", one,
                f"Predicted clean images of the seeds {seeds}, a row without and a row with guidance each, from noise "
                f"level {one.sigmas[0]:.3g} down to {one.sigmas[-1]:.3g}, and the finished images",
            ),
            figures.corrections(
                f"corrections-{k}", one,
                f"The mean correction is largest, {peaks[top]:.3g}, at noise level {one.sigmas[top]:.3g}; the finished "
                f"images of the two runs differ by {one.distances[-1].mean():.3g} on average",
            ),
            _along(one),
        ]  # fmt: skip
    return section


def _along(one: Trajectory) -> Html:
    """The numbers of the picture, as means over the seeds."""
    ratios = [line[np.isfinite(line)] for line in one.log_ratios]
    rows = [
        [f"{sigma:.4g}", f"{added:.3g}", f"{apart:.3g}", f"{ratio.mean():.3g}" if len(ratio) else "not asked"]
        for sigma, added, apart, ratio in zip(
            one.sigmas, one.corrections.mean(1), one.distances[:-1].mean(1), ratios, strict=True
        )
    ]
    headings = ["sigma", "|correction|", "guided from unguided", "log-ratio"]
    return tag("details", tag("summary", "Numbers"), table("Means over the seeds", headings, rows))


# Quality --------------------------------------------------------------------------------------------------------------
def quality(evaluations: Sequence[Evaluation], all_runs: Sequence[Run]) -> Section:
    section = Section("quality", "Quality")
    for k, evaluation in enumerate(evaluations, start=1):
        section.parts.append(tag("h3", str(evaluation.path)))
        section.parts.append(
            paragraph(
                f"Against {evaluation.reference}, in the features of {evaluation.features}. Intervals are in brackets."
            )
        )
        section.parts += _judged(evaluation)
        counts = sorted({row.images for row in evaluation.rows if DISTANCE in row.metrics})
        if len(counts) > 1:
            text = f"Rows of {counts[0]:,} to {counts[-1]:,} images: compare {DISTANCE} between equal numbers only."
            section.parts.append(paragraph(text, note=True))
        if counts:
            alt = ", ".join(f"{r.name} {r.metrics[DISTANCE]}" for r in evaluation.rows if DISTANCE in r.metrics)
            section.parts.append(figures.distances(f"quality-{k}", evaluation, f"Frechet distances: {alt}"))
        section.parts += _against_speed(k, evaluation, all_runs)
    return section


def _judged(evaluation: Evaluation) -> Iterator[Html]:
    names = evaluation.metrics
    yield table(
        "Metrics of each set of images", ["images of", "images", "seeds", *names],
        ([row.name, f"{row.images:,}", row.seeds, *_cells(names, row.metrics)] for row in evaluation.rows),
    )  # fmt: skip
    if evaluation.over_seeds:
        cells = (
            [of, *(f"{values[name]:.4g}" if name in values else "" for name in names)]
            for of, values in evaluation.over_seeds
        )
        yield table("Over ranges of seeds", ["of", *names], cells)
    compared = [row for row in evaluation.rows if row.differences]
    names = list(dict.fromkeys(name for row in compared for name in row.differences))
    if compared:
        yield table(
            "Differences on equal seeds", ["images of", "less those of", *names],
            ([row.name, row.against, *_cells(names, row.differences)] for row in compared),
        )  # fmt: skip


def _cells(names: Sequence[str], values: Mapping[str, Value]) -> list[str]:
    return [str(values[name]) if name in values else "" for name in names]


def _against_speed(k: int, evaluation: Evaluation, all_runs: Sequence[Run]) -> Iterator[Html | Picture]:
    points, rows, without = [], [], []
    for row in evaluation.rows:
        run, why = run_of(row, evaluation, all_runs)
        if run is None or run.speed is None or DISTANCE not in row.metrics:
            without.append(f"{row.name}: {why or f'it has no {DISTANCE}'}")
            continue
        points.append(_point(row, run, all_runs.index(run) + 1))
        rows.append([
            row.name, points[-1].label, run.method, described(run.settings) or "none",
            timings.number(run.speed.images_per_second), str(row.metrics[DISTANCE]), run.speed.machine,
        ])  # fmt: skip
    if points:
        best = figures.front(points)
        alt = "; ".join(f"{p.label}, {p.method}: {p.images_per_second:.3g} images/s, {p.distance:.4g}" for p in points)
        yield figures.quality_and_speed(
            f"quality-and-speed-{k}", points,
            f"Frechet distance against images a second of {len(points)} runs. {alt}. The front goes from "
            f"{best[0].label} to {best[-1].label}",
        )  # fmt: skip
        yield paragraph(
            "A point a folder, by its number in the table of runs. The broken line joins those than which none is both "
            "faster and better. Speeds are those of the drawing alone, from the manifests."
        )
        if len({point.machine for point in points}) > 1:
            yield paragraph("The runs are of different machines; each has a front of its own.", note=True)
        headings = ["images of", "point", "method", "settings", "images/s", DISTANCE, "machine"]
        yield table("Quality and speed", headings, rows)
    if without:
        yield paragraph("No point in quality against speed: ", "; ".join(without), ".", note=True)


def _point(row: Judged, run: Run, number: int) -> figures.Point:
    assert run.speed is not None
    value = row.metrics[DISTANCE]
    interval = None if value.low is None or value.high is None else (value.low, value.high)
    label = f"{number}: {run.steps.replace(' steps,', '')}, {run.job.get('runtime')}"
    return figures.Point(label, run.method, run.speed.machine, run.speed.images_per_second, value.value, interval)


# Errors and times -----------------------------------------------------------------------------------------------------
def errors(found: Sequence[NoiseErrors]) -> Section:
    section = Section("errors", "Error by noise level and number format")
    section.parts.append(
        paragraph("Largest error of any sample against eager float32, relative to the largest number of that sample.")
    )
    for k, one in enumerate(found, start=1):
        worst = ", ".join(f"{name} {max(column):.1e}" for name, column in one.errors.items())
        rows = [
            [f"{sigma:.4g}", *(f"{column[i]:.1e}" if column[i] else "0" for column in one.errors.values())]
            for i, sigma in enumerate(one.sigmas)
        ]
        section.parts += [
            figures.noise_errors(f"errors-{k}", one, f"Largest errors over all noise levels: {worst}"),
            table(f"Error of the {one.of}, in numbers", ["sigma", *one.errors], rows),
        ]
    origins = dict.fromkeys(one.origin or "the file does not say" for one in found)
    section.parts.append(paragraph(f"Machine: {'; '.join(origins)}."))
    return section


def times(files: Sequence[tuple[str, dict[str, Any]]]) -> Section:
    section = Section("timing", "Timing")
    section.parts.append(paragraph("Ratios are of times that were measured in one run, beside one another."))
    for k, (name, content) in enumerate(files, start=1):
        rows = timings.rows([content])
        section.parts += [tag("h3", name), paragraph(timings.origin(content))]
        faster = [row for row in rows if "speedup" in row]
        if faster:
            alt = "Times as fast as eager: " + ", ".join(f"{row['name']} {row['speedup']:.2f}" for row in faster)
            section.parts.append(figures.speed_ups(f"timing-{k}", rows, alt))
        for headings, cells in timings.tables(rows):
            section.parts.append(table(f"Times of {headings[0]}", headings, cells))
    return section
