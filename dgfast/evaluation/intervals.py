"""How sure a metric is: 95 % intervals by the bootstrap (Efron, 1979), of generated images against a fixed reference.

A resample draws as many of the images, with repetition. Repetition alone makes a distance larger: the interval is that
of the resampled values, shifted so that their mean is the value itself. Sets of equally many images are resampled
alike, image by image in the order of their seeds: on equal seeds differences are those of pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SEED = 0
_QUANTILES = (0.025, 0.975)
FEWEST_RESAMPLES = 40
"""Of which one lies below the lower quantile and one above the upper one."""


@dataclass(frozen=True)
class Estimate:
    """A metric's value and the interval around it; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


def resamples(images: int, count: int) -> Iterator[Tensor]:
    """How often each image stands in a resample, int64 [images], `count` times; the same for equally many images."""
    generator = np.random.default_rng(_SEED)
    for _ in range(count):
        picks = generator.integers(0, images, images)
        yield torch.from_numpy(np.bincount(picks, minlength=images))


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """The value with the interval of its resamples [R], shifted by their bias."""
    if not len(resampled):
        return Estimate(value)
    low, high = np.quantile(resampled - resampled.mean() + value, _QUANTILES)
    return Estimate(value, float(low), float(high))
