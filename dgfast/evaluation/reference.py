"""What generated images are compared with: moments from a file, or the features of other images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgfast.checkpoints import statistics
from dgfast.errors import UserError, one_line
from dgfast.evaluation import npz
from dgfast.evaluation.collect import Done, all_of, collect
from dgfast.evaluation.features import Extractor
from dgfast.evaluation.images import Images
from dgfast.evaluation.moments import Moments


@dataclass(frozen=True)
class Reference:
    """
    Attributes:
        name: for tables. images: how many it has; None where a file of moments does not say.
        moments: of the features. sample: float32 [M, D], features of its images; None where it has none.
    """

    name: str
    images: int | None
    moments: Moments
    sample: Tensor | None


def of_images(images: Images, name: str, extractor: Extractor, most: int, done: Done) -> Reference:
    """Their features are what others are compared with; those of at most so many are kept.

    Raises:
        UserError: all of them have the same features.
    """
    (real,) = collect(images, [all_of(images)], extractor, done, most=most)
    if bool((real.sample == real.sample[0]).all()):
        raise UserError(
            f"features of {extractor.name} are the same for all images of {name}, and nothing can be compared by them; "
            "see --features-range for what it reads"
        )
    return Reference(name, real.count, real.moments, real.sample)


def holds_moments(path: Path) -> bool:
    """Whether a file is taken for one of moments, and not of images: EDM2's pickle, or an npz without images.

    Raises:
        UserError: no such file, or no npz file.
    """
    if path.is_dir():
        return False
    return path.suffix == ".pkl" or not {"images", "arr_0"} & npz.headers(path).keys()


def of_moments(path: Path, extractor: Extractor, width: int) -> Reference:
    """Moments as EDM's `.npz` and EDM2's `.pkl` hold them.

    Args:
        width: of the extractor's features; of several metrics in a file, it tells which is meant.

    Raises:
        UserError: no moments there, or of features of another width.
    """
    found = _of_pickle(path) if path.suffix == ".pkl" else {"": _of_npz(path)}
    fitting = {name: moments for name, moments in found.items() if moments.width == width}
    if len(fitting) != 1:
        held = ", ".join(f"{name + ' of ' if name else ''}{moments.width}" for name, moments in found.items())
        raise UserError(
            f"--reference {path}: features of {extractor.name} have {width} numbers, and the moments there are those "
            f"of {one_line(held, most=200)}; exactly one must fit: give the network of those features with --features"
        )
    ((name, moments),) = fitting.items()
    return Reference(f"{path}: {name}" if name else str(path), None, moments, None)


def _of_pickle(path: Path) -> dict[str, Moments]:
    return {name: _moments(*both) for name, both in statistics.read_pickle(path).items()}


def _of_npz(path: Path) -> Moments:
    headers = npz.headers(path)
    if missing := {"mu", "sigma"} - headers.keys():
        raise UserError(
            f"--reference {path}: neither images (`images` or `arr_0`) nor moments: no "
            f"{' and no '.join(sorted(missing))}; it holds {', '.join(headers)}"
        )
    if max((*headers["mu"].shape, *headers["sigma"].shape), default=0) > statistics.MOST_WIDTH:
        raise UserError(f"--reference {path}: more than {statistics.MOST_WIDTH:,} numbers a feature are not compared")
    return _moments(*statistics.check(path, npz.whole(path, "mu"), npz.whole(path, "sigma")))


def _moments(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))
