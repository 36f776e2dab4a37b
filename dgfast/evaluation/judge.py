"""Rows of a table: what the metrics say of each set of images, how sure that is, and how far apart sets are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgfast.errors import UserError
from dgfast.evaluation.collect import Collected, Done, all_of, collect, some_of
from dgfast.evaluation.features import Extractor
from dgfast.evaluation.images import Images
from dgfast.evaluation.intervals import Estimate, estimate, resamples
from dgfast.evaluation.log_ratio import LogRatio
from dgfast.evaluation.moments import FrechetDistance, weighted_moments
from dgfast.evaluation.neighbours import FEWEST, NEIGHBOURS, Neighbours, kernel_distance
from dgfast.evaluation.reference import Reference
from dgfast.ranges import Ranges

METRICS = ("frechet", "kernel", *NEIGHBOURS, "log_ratio")
OF_IMAGES = ("kernel", *NEIGHBOURS)
"""Those that need the reference's images; the Frechet distance needs moments alone."""
_FEWEST_MOMENTS = 2

SeedRange = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """A set of images, or those of a range of seeds, under the metrics.

    Attributes:
        seeds: of its images, as `Ranges` writes them; None where nothing tells them.
        metrics: by name. resampled: values of the resamples [R], of the metrics that have an interval.
        labels: int64 [images], in the order of the seeds; -1 for none.
    """

    name: str
    folder: Path | None
    images: int
    seeds: str | None
    metrics: dict[str, Estimate]
    resampled: dict[str, np.ndarray]
    labels: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)

    def less(self, other: "Row") -> dict[str, Estimate]:
        """How much more each metric is here than there, where both were resampled; of pairs, if the seeds are equal."""
        return {
            name: estimate(self.metrics[name].value - other.metrics[name].value, values - other.resampled[name])
            for name, values in self.resampled.items()
            if name in other.resampled
        }


@dataclass(frozen=True)
class Judge:
    """The metrics of sets of images against a reference.

    Attributes:
        metrics: names of `METRICS`. most: images of each side that those of `OF_IMAGES` look at.
        bootstrap: how many resamples the intervals are of; 0 for none.
        log_ratio: who is asked for that metric; None if it is not among them.
        resampled: told of each resample whose Frechet distance is known.
    """

    extractor: Extractor
    reference: Reference
    metrics: Sequence[str]
    most: int
    bootstrap: int
    log_ratio: LogRatio | None = None
    resampled: Done = lambda count: None

    def __call__(self, images: Images, ranges: Sequence[SeedRange] = (), done: Done = lambda count: None) -> list[Row]:
        """One row, or one a range of seeds.

        Raises:
            UserError: see `collect` and `Images.parts`.
        """
        selections = [some_of(images, *each) for each in ranges] or [all_of(images)]
        gathered = collect(
            images, selections, self.extractor, done,
            most=self.most, everything=self.bootstrap > 0, log_ratio=self.log_ratio,
        )  # fmt: skip
        names = [f"{images.name} seeds {first}-{last}" for first, last in ranges] or [images.name]
        return [
            Row(
                name,
                images.folder,
                one.count,
                _seeds(images, places),
                *self._measured(one),
                one.labels,
                images.settings,
            )
            for name, places, one in zip(names, selections, gathered, strict=True)
        ]

    def _measured(self, drawn: Collected) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
        values: dict[str, float] = {}
        terms: dict[str, np.ndarray] = {}
        if "frechet" in self.metrics:
            values["frechet"] = self._frechet(drawn.moments)
        if "kernel" in self.metrics and self.reference.sample is not None:
            values["kernel"] = kernel_distance(self.reference.sample, drawn.sample)
        if self._neighbours is not None:
            of_sample, terms = self._neighbours(drawn.sample)
            values |= {name: value for name, value in of_sample.items() if name in self.metrics}
        if drawn.log_ratios is not None:
            values["log_ratio"], terms["log_ratio"] = float(drawn.log_ratios.mean()), drawn.log_ratios.numpy()
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is not a finite number: features of {self.extractor.name} are too large for it; give "
                    f"--metrics without {name}"
                )
        resampled = {name: self._means(values) for name, values in terms.items() if name in self.metrics}
        if "frechet" in self.metrics:
            resampled["frechet"] = self._resampled_frechet(drawn)
        resampled = {name: resampled[name] for name in METRICS if len(resampled.get(name, ()))}
        none = np.empty(0)
        estimates = {name: estimate(values[name], resampled.get(name, none)) for name in METRICS if name in values}
        return estimates, resampled

    def _resampled_frechet(self, drawn: Collected) -> np.ndarray:
        features = drawn.features.to(self.extractor.device)
        distances = []
        for counts in resamples(drawn.count, self.bootstrap):
            distances.append(self._frechet(weighted_moments(features, counts.to(features.device))))
            self.resampled(1)
        return np.array(distances)

    def _means(self, terms: np.ndarray) -> np.ndarray:
        return np.array(
            [float(counts.numpy() @ terms) / len(terms) for counts in resamples(len(terms), self.bootstrap)]
        )

    @cached_property
    def _frechet(self) -> FrechetDistance:
        return FrechetDistance(self.reference.moments)

    @cached_property
    def _neighbours(self) -> Neighbours | None:
        wanted = self.reference.sample is not None and {*self.metrics} & {*NEIGHBOURS}
        return Neighbours(self.reference.sample) if wanted and self.reference.sample is not None else None


def fewest(metrics: Sequence[str]) -> int:
    """How many images the metrics take at least."""
    return FEWEST if {*metrics} & {*OF_IMAGES} else _FEWEST_MOMENTS


def require_fit(
    images: Images, shape: tuple[int, int, int], whose: str, metrics: Sequence[str], ranges: Sequence[SeedRange] = ()
) -> None:
    """
    Args:
        shape: height, width and channels that the images must have, which are those of `whose` images.

    Raises:
        UserError: other images, too few of them, or none of some seed of the ranges.
    """
    counts = {images.name: len(images)}
    if ranges and images.seeds is None:
        raise UserError(
            f"--seed-ranges: nothing tells the seeds of {images.name}; shards of `dgfast sample` and pictures named by "
            "their seeds do"
        )
    for first, last in ranges:
        count = int((some_of(images, first, last) >= 0).sum())
        if count != last - first + 1:
            raise UserError(f"{images.name} holds {count} images of the {last - first + 1} seeds {first}-{last}")
        counts[f"--seed-ranges {first}-{last}"] = count
    for name, count in counts.items():
        if count < fewest(metrics):
            raise UserError(
                f"{name}: {count} images; {fewest(metrics)} at least can be compared by {', '.join(metrics)}, better "
                "some thousands"
            )
    if images.shape != shape:
        raise UserError(f"{images.name}: these are {_described(images.shape)} images, and {whose} {_described(shape)}")


def _described(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{channels} x {height} x {width}"


def _seeds(images: Images, places: np.ndarray) -> str | None:
    return None if images.seeds is None else str(Ranges.of(sorted(images.seeds[places >= 0].tolist())))
