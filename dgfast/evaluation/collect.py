"""One pass over a set of images: moments of the features, and as many of the features as are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.evaluation.features import Extractor
from dgfast.evaluation.images import Images
from dgfast.evaluation.log_ratio import LogRatio
from dgfast.evaluation.moments import Moments, Sums

Done = Callable[[int], object]
"""Told how many more images went through the networks."""
_SEED = 0


def all_of(images: Images) -> np.ndarray:
    """Where each image stands in the order of the seeds, or in its own where there are none: int64 [count]."""
    if images.seeds is None:
        return np.arange(len(images))
    places = np.empty(len(images), dtype=np.int64)
    places[np.argsort(images.seeds, kind="stable")] = np.arange(len(images))
    return places


def some_of(images: Images, first: int, last: int) -> np.ndarray:
    """The same among images of the seeds from `first` to `last`, -1 for all others."""
    assert images.seeds is not None
    chosen = (images.seeds >= first) & (images.seeds <= last)
    places = np.full(len(images), -1)
    places[np.flatnonzero(chosen)[np.argsort(images.seeds[chosen], kind="stable")]] = np.arange(chosen.sum())
    return places


def subset(count: int, most: int) -> np.ndarray:
    """The places of at most so many of `count` images, evenly likely, in order; the same for equally many images."""
    return np.sort(np.random.default_rng(_SEED).permutation(count)[:most])


@dataclass(frozen=True)
class Collected:
    """What is known of a set of images.

    Attributes:
        count: of images. moments: of all features.
        features: float32 [n, D] of all images by their places, or of `subset` alone. sample: of `subset`.
        labels: int64 [count] by their places, -1 for none. log_ratios: float64 [count]; None where nobody asked.
    """

    count: int
    moments: Moments
    features: Tensor
    sample: Tensor
    labels: np.ndarray
    log_ratios: Tensor | None


class _Gathering:
    def __init__(self, places: np.ndarray, most: int, everything: bool, log_ratio: bool) -> None:
        self.places, self.count = places, int((places >= 0).sum())
        self.subset = subset(self.count, most)
        self.slots = np.arange(self.count)
        if not everything:
            self.slots = np.full(self.count, -1)
            self.slots[self.subset] = np.arange(len(self.subset))
        self.everything, self.sums, self.features = everything, Sums(), torch.zeros(0)
        self.labels = np.full(self.count, -1)
        self.log_ratios = torch.zeros(self.count, dtype=torch.float64) if log_ratio else None

    def add(self, features: Tensor, labels: np.ndarray, ratios: Tensor | None, start: int) -> None:
        places = self.places[start : start + len(features)]
        mine = np.flatnonzero(places >= 0)
        if not len(mine):
            return
        chosen, places = features[torch.from_numpy(mine).to(features.device)], places[mine]
        self.labels[places] = labels[mine]
        if self.sums.width not in (None, chosen.shape[1]):
            raise UserError(
                f"features of one image have {chosen.shape[1]} numbers, and those of others {self.sums.width}: the "
                "network of --features does not give equally many of every image"
            )
        if not len(self.features):
            self.features = torch.empty(int(self.slots.max()) + 1, chosen.shape[1])
        self.sums.add(chosen)
        slots = self.slots[places]
        kept = np.flatnonzero(slots >= 0)
        self.features[torch.from_numpy(slots[kept])] = chosen.cpu()[torch.from_numpy(kept)]
        if self.log_ratios is not None and ratios is not None:
            self.log_ratios[torch.from_numpy(places)] = ratios[torch.from_numpy(mine)]

    def result(self) -> Collected:
        moments = self.sums.moments()
        moments = Moments(moments.mean.cpu(), moments.covariance.cpu())
        sample = self.features[torch.from_numpy(self.subset)] if self.everything else self.features
        return Collected(self.count, moments, self.features, sample, self.labels, self.log_ratios)


def collect(
    images: Images, selections: Sequence[np.ndarray], extractor: Extractor, done: Done, *,
    most: int, everything: bool = False, log_ratio: LogRatio | None = None,
) -> list[Collected]:  # fmt: skip
    """What is known of each selection of the images, by one pass over all of them.

    Args:
        selections: of `all_of` or `some_of`.
        most: features in a sample. everything: keep all features, not the sample alone.

    Raises:
        UserError: see `Images.parts`, `Extractor` and `LogRatio`.
    """
    gatherings = [_Gathering(places, most, everything, log_ratio is not None) for places in selections]
    start = 0
    for pixels, classes in images.parts():
        batch, labels = torch.from_numpy(np.array(pixels)), torch.from_numpy(classes)
        features, ratios = extractor(batch), None
        if log_ratio is not None:
            log_ratio.require_labels(images.name, labels)
            ratios = log_ratio(batch, labels, start)
        for gathering in gatherings:
            gathering.add(features, classes, ratios, start)
        start += len(batch)
        done(len(batch))
    return [gathering.result() for gathering in gatherings]
