"""Averages over training of any length, from those that were saved (EDM2, arXiv 2312.02696, section 3 and appendix C).

The average of length k weighs the weights after n of N images as n^k; its relative standard deviation names it. Such
profiles of snapshots, each cut off where it was saved, are a basis: the wanted profile is approximated by them in the
mean square, and the same sum of the snapshots is the wanted average, though it was never tracked.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgfast.checkpoints import nvidia_pickle, one_line
from dgfast.checkpoints.nvidia_pickle import Snapshot
from dgfast.errors import UserError

MOST_STD = 1 / math.sqrt(12)
"""The relative standard deviation of the mean over all of training, k = 0; no profile that ends now has more."""
LEAST_STD = 1e-4
"""Far less than training tracks; from about 1e-150 on the exponent of its profile is infinite."""
_NAME = re.compile(r"-(\d+)-(\d+\.\d+)\.pkl$")
_FARTHEST = 0.2
"""A profile farther from the wanted one, as `distance` tells, is another average; EDM2's own are within 0.01."""


# Profiles -------------------------------------------------------------------------------------------------------------
def relative_std(k: np.ndarray) -> np.ndarray:
    """Standard deviation of the profile t^k on [0, T], over T."""
    return np.sqrt((k + 1) / ((k + 2) ** 2 * (k + 3)))


def exponent(std: np.ndarray) -> np.ndarray:
    """The k of these relative standard deviations, `relative_std` turned round: the largest real root of its cubic."""
    inverse = np.asarray(std, dtype=np.float64) ** -2.0
    roots = (np.roots([1, 7, 16 - one, 12 - one]).real.max() for one in inverse.ravel())
    return np.array(list(roots)).reshape(inverse.shape)


def decay(std: np.ndarray, images: np.ndarray | float, batch: np.ndarray | float) -> np.ndarray:
    """How much of the average stays when a batch brings the number of images seen to `images`."""
    return (1 - batch / images) ** (exponent(std) + 1)


def inner_products(ends_a: np.ndarray, stds_a: np.ndarray, ends_b: np.ndarray, stds_b: np.ndarray) -> np.ndarray:
    """Integrals of the products of two profiles, each with the integral 1 up to its own end: [a, b]."""
    t_a, k_a = np.asarray(ends_a, np.float64)[:, None], exponent(stds_a)[:, None]
    t_b, k_b = np.asarray(ends_b, np.float64)[None, :], exponent(stds_b)[None, :]
    ratio = np.where(t_a < t_b, (t_a / t_b) ** k_b, (t_b / t_a) ** k_a)
    return (k_a + 1) * (k_b + 1) * ratio / ((k_a + k_b + 1) * np.maximum(t_a, t_b))


def coefficients(ends: np.ndarray, stds: np.ndarray, end: float, wanted: np.ndarray) -> np.ndarray:
    """What to weigh the averages by for those of the `wanted` stds at `end`: float64 [in, out], each column sums to 1.

    Args:
        ends, stds: images seen and relative standard deviation of each average that is there, [in].
    """
    at = np.full(np.shape(wanted), end, dtype=np.float64)
    solved = np.linalg.solve(inner_products(ends, stds, ends, stds), inner_products(ends, stds, at, wanted))
    return solved / solved.sum(axis=0)


def distance(ends: np.ndarray, stds: np.ndarray, end: float, wanted: float, weights: np.ndarray) -> float:
    """How far the weighted profiles are from the wanted one: root mean square, relative to it."""
    at, std = np.array([end], dtype=np.float64), np.array([wanted])
    own = weights @ inner_products(ends, stds, ends, stds) @ weights
    both = weights @ inner_products(ends, stds, at, std)[:, 0]
    target = inner_products(at, std, at, std)[0, 0]
    return math.sqrt(max(own - 2 * both + target, 0.0) / target)


# Snapshots ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Average:
    """A snapshot by its name: the images seen, and the relative standard deviation of its average."""

    path: Path
    images: int
    std: float


def average_of(path: Path) -> Average:
    """
    Raises:
        UserError: a name that does not say what it is an average of.
    """
    found = _NAME.search(path.name)
    if not found or not LEAST_STD < float(found[2]) < MOST_STD or not int(found[1]):
        raise UserError(
            f"{path}: a snapshot's name must end as EDM2's do, -KIMG-STD.pkl, "
            "such as network-snapshot-0008388-0.050.pkl"
        )
    return Average(path, _images(int(found[1])), float(found[2]))


def _images(kimg: int) -> int:
    """How many images are meant by so many thousands in a name: snapshots are saved at whole multiples of 1024."""
    return (kimg * 1000 + 999) // 1024 * 1024


def reconstruct(paths: Sequence[Path], std: float, kimg: int | None = None) -> tuple[Snapshot, Path, str]:
    """The average of that relative standard deviation where one of the snapshots was saved; later ones are left out.

    Sums are of float32. A snapshot is read when its turn comes: memory holds two networks.

    Args:
        kimg: thousands of images seen then, as a name has them; None: the latest of the snapshots.

    Returns:
        the network with float32 weights, the last snapshot that is in it, and how it was made, in one line.

    Raises:
        UserError: a standard deviation that no average has, or that these snapshots do not come near; no snapshot of
            `kimg`; snapshots of different networks, one given twice, or files that are none.
    """
    if not LEAST_STD < std < MOST_STD:
        raise UserError(
            f"--phema-std {std:g}: an average over training has one above {LEAST_STD} and below {MOST_STD:.4f}"
        )
    averages = sorted(map(average_of, paths), key=lambda average: (average.images, average.std))
    for one, other in itertools.pairwise(averages):
        if (one.images, one.std) == (other.images, other.std):
            raise UserError(f"{one.path} and {other.path} are the same average by their names: leave one out")
    end = averages[-1].images if kimg is None else _images(kimg)
    if end not in [average.images for average in averages]:
        known = ", ".join(dict.fromkeys(_NAME.search(a.path.name)[1] for a in averages))  # type: ignore[index]
        raise UserError(f"--phema-kimg {kimg}: no snapshot was saved then, only {one_line(known)}")
    averages = [average for average in averages if average.images <= end]
    ends, stds = (np.array([getattr(a, name) for a in averages], dtype=np.float64) for name in ("images", "std"))
    weights = coefficients(ends, stds, end, np.array([std]))[:, 0]
    far = distance(ends, stds, end, std, weights)
    if not far <= _FARTHEST:
        raise UserError(
            f"--phema-std {std:g} is out of reach: the nearest average of {len(averages)} snapshots differs from it by "
            f"{100 * far:.0f} %; give more snapshots, earlier ones and of both averages that training tracked"
        )
    first, tensors = _summed(averages, weights.tolist())
    last = averages[-1].path
    made = (
        f"average of relative std {std:g} as of {one_line(last.name)}, from {len(averages)} snapshots; "
        f"its profile to {100 * far:.1g} %"
    )
    return Snapshot(first.kind, first.keywords, tensors, first.encoder, first.vae), last, made


def _summed(averages: Sequence[Average], weights: Sequence[float]) -> tuple[Snapshot, dict[str, Tensor]]:
    """The first snapshot, and the weighted sum of all; buffers, which training leaves alone, are the first one's."""
    first = nvidia_pickle.read(averages[0].path)
    if first.kind != "EDM2Precond":
        raise UserError(f"{averages[0].path} is no snapshot of EDM2, whose averages have such profiles")
    total = {name: torch.zeros(value.shape) for name, value in first.tensors.items()}
    for average, weight in zip(averages, weights, strict=True):
        snapshot = first if average is averages[0] else nvidia_pickle.read(average.path)
        _require_same(first, averages[0].path, snapshot, average.path)
        for name, value in snapshot.tensors.items():
            if _is_buffer(name):
                total[name] = value.float()
            else:
                total[name].add_(value.float(), alpha=weight)
    return first, total


def _is_buffer(name: str) -> bool:
    return name.endswith(("_fourier.freqs", "_fourier.phases"))


def _require_same(first: Snapshot, path: Path, other: Snapshot, other_path: Path) -> None:
    """Raises UserError unless both are of one training run: it draws its frequencies once."""
    own, others = first.keywords, other.keywords
    differing = [name for name in {**own, **others} if own.get(name) != others.get(name)]
    differing += [
        name for name, value in first.tensors.items()
        if _is_buffer(name) and not (name in other.tensors and torch.equal(value, other.tensors[name]))
    ]  # fmt: skip
    if first.kind != other.kind or first.tensors.keys() != other.tensors.keys() or differing:
        what = one_line(", ".join(differing[:3])) or "other layers"
        raise UserError(f"{path} and {other_path} are of different networks ({what}): give snapshots of one training")
