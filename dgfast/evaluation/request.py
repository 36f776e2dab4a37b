"""What `dgfast evaluate` is asked for, looked at before the work begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dgfast import bundle as bundles
from dgfast.devices import pick_device
from dgfast.errors import UserError
from dgfast.evaluation import features, reference
from dgfast.evaluation.collect import Done
from dgfast.evaluation.features import Extractor
from dgfast.evaluation.images import Images, of_arrays, open_images
from dgfast.evaluation.intervals import FEWEST_RESAMPLES
from dgfast.evaluation.judge import METRICS, OF_IMAGES, Judge, SeedRange, require_fit
from dgfast.evaluation.log_ratio import LogRatio
from dgfast.evaluation.neighbours import FEWEST
from dgfast.evaluation.reference import Reference
from dgfast.manifest import promised_images
from dgfast.training.data import ImageSet, load_images, split

_YARDSTICK = 2000  # training images in the first row
_DATA, _HOLDOUT = "mnist", 1000
_BOOTSTRAP, _CHEAP_WIDTH = 200, 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command by name; None where they are left out. ranges: of seeds, each judged by itself."""

    folders: Sequence[Path]
    bundle: str
    features: Path | None
    features_range: str | None
    features_size: int | None
    data: str | None
    holdout: int | None
    reference: Path | None
    metrics: str | None
    bootstrap: int | None
    subset: int
    device: str | None
    ranges: Sequence[SeedRange]


@dataclass(frozen=True)
class Real:
    """Real images. images: the reference's, None where it is moments. name: of it. yardstick: of the first row."""

    images: Images | None
    name: str
    yardstick: Sequence[Images] = ()


@dataclass(frozen=True)
class Prepared:
    """Everything that fits together, before the first image is judged.

    Attributes:
        sets: the folders' images. width: how many numbers a feature has. moments: the reference, where it is no images.
    """

    request: Request
    extractor: Extractor
    real: Real
    sets: Sequence[Images]
    metrics: Sequence[str]
    log_ratio: LogRatio | None
    width: int = 0
    moments: Reference | None = None

    @property
    def yardstick(self) -> Sequence[Images]:
        """Training images for the first row, or none."""
        return self.real.yardstick

    @property
    def bootstrap(self) -> int:
        """How many resamples the intervals are of."""
        if self.request.bootstrap is not None:
            return self.request.bootstrap
        return _BOOTSTRAP if self.width <= _CHEAP_WIDTH else 0

    @property
    def counts(self) -> list[int]:
        """Images of each row."""
        ranges = [last - first + 1 for first, last in self.request.ranges]
        return [*map(len, self.yardstick), *(ranges * len(self.sets) or map(len, self.sets))]

    @property
    def notes(self) -> list[str]:
        """What the user is told beside the results."""
        notes = [
            f"{folder} has no manifest that says how many images belong to it; judging those there"
            for folder in self.request.folders
            if folder.is_dir() and promised_images(folder) is None
        ]
        if self.real.images is None and not self.request.metrics:
            notes.append(f"{', '.join(OF_IMAGES)} need images of the reference, which holds moments alone")
        if self.request.bootstrap is None and not self.bootstrap:
            notes.append(f"no intervals: features of {self.width} numbers make them slow; see --bootstrap")
        least, largest = min(self.counts), max(self.counts)
        if "frechet" in self.metrics and least <= self.width:
            notes.append(
                f"frechet: {least:,} images are few for features of {self.width:,} numbers; take more than that"
            )
        if "frechet" in self.metrics and least < largest:
            notes.append(f"frechet: rows of {least:,} to {largest:,} images; compare it between equal numbers only")
        most = self.request.subset
        real = [] if self.real.images is None else [self.real.images]
        if {*self.metrics} & {*OF_IMAGES} and max(map(len, (*real, *self.yardstick, *self.sets))) > most:
            some = ", ".join(name for name in OF_IMAGES if name in self.metrics)
            notes.append(f"{some}: of {most:,} images of each side at most, drawn at random (--subset)")
        return notes

    def _notes_on_numbers(self) -> Iterator[str]:
        least, largest = min(self.counts), max(self.counts)
        if least <= self.width:
            yield f"frechet: {least:,} images are few for features of {self.width:,} numbers; take more than that"
        if least < largest:
            yield f"frechet: rows of {least:,} to {largest:,} images; compare it between equal numbers only"

    @property
    def work(self) -> int:
        """How many images go through the networks."""
        real = [] if self.real.images is None else [self.real.images]
        return sum(map(len, (*real, *self.yardstick, *self.sets)))

    @property
    def resamples(self) -> int:
        """How many Frechet distances the intervals of all rows take, which is what takes time."""
        return self.bootstrap * len(self.counts) if "frechet" in self.metrics else 0

    def judge(self, done: Done, resampled: Done = lambda count: None) -> Judge:
        """With the reference's features computed. resampled: told of each of `resamples`.

        Raises:
            UserError: see `reference.of_images`.
        """
        whom = self._reference(done)
        return Judge(self.extractor, whom, self.metrics, self.request.subset, self.bootstrap, self.log_ratio, resampled)

    def _reference(self, done: Done) -> Reference:
        if self.real.images is not None:
            return reference.of_images(self.real.images, self.real.name, self.extractor, self.request.subset, done)
        assert self.moments is not None
        return self.moments


def prepare(request: Request) -> Prepared:
    """
    Raises:
        UserError: anything that does not fit.
    """
    if request.reference is not None and (request.data is not None or request.holdout is not None):
        raise UserError("--reference and --data or --holdout are two references; give one")
    if request.bootstrap is not None and 0 < request.bootstrap < FEWEST_RESAMPLES:
        raise UserError(
            f"--bootstrap {request.bootstrap}: no 95 % interval can be told from so few resamples; give "
            f"{FEWEST_RESAMPLES} at least, better 200, or 0 for none"
        )
    paths = [folder.resolve() for folder in request.folders]
    if twice := next((folder for k, folder in enumerate(request.folders) if paths[k] in paths[:k]), None):
        raise UserError(f"{twice} is given twice; give it once")
    if request.features is None and (request.features_range or request.features_size):
        raise UserError("--features-range and --features-size say what the file of --features reads; give it too")
    extractor, real = _extractor(request), _real(request)
    sets = [open_images(folder) for folder in request.folders]
    metrics, log_ratio = _metrics(request, real.images is None, extractor.device)
    prepared = Prepared(request, extractor, real, sets, metrics, log_ratio)
    shape, whose = _shape(prepared)
    for images in (*([] if real.images is None else [real.images]), *real.yardstick):
        require_fit(images, shape, whose, metrics)
    for images in sets:
        require_fit(images, shape, whose, metrics, request.ranges)
    for images in (*real.yardstick, *sets):  # wrong images and labels, before hours of work
        _, labels = next(images.parts())
        if log_ratio is not None:
            log_ratio.require_labels(images.name, torch.from_numpy(labels))
    width = extractor.width(shape)
    if real.images is not None or request.reference is None:
        return replace(prepared, width=width)
    return replace(prepared, width=width, moments=reference.of_moments(request.reference, extractor, width))


def _shape(prepared: Prepared) -> tuple[tuple[int, int, int], str]:
    """Of all images, and whose it is."""
    if prepared.log_ratio is not None:
        return prepared.log_ratio.shape, f"the networks of bundle {prepared.request.bundle} judge"
    first, read = prepared.real.images or prepared.sets[0], prepared.extractor.channels
    height, width, channels = first.shape
    if read not in (None, channels):
        return (height, width, read or 0), f"the network of the features ({prepared.extractor.name}) reads"
    return first.shape, f"those of {first.name} are"


# What judges, and what is compared with -------------------------------------------------------------------------------
def _extractor(request: Request) -> Extractor:
    device = pick_device(request.device)
    if request.features is None:
        return features.of_bundle(bundles.read(request.bundle), device)
    return features.of_file(request.features, request.features_range, request.features_size, device)


def _real(request: Request) -> Real:
    """
    Raises:
        UserError: no such images, or too few of the reference or of the first row.
    """
    path = request.reference
    if path is not None:
        if not path.exists():
            raise UserError(f"--reference {path}: no such file or folder")
        return Real(None if reference.holds_moments(path) else open_images(path), str(path))
    data, holdout = request.data or _DATA, _HOLDOUT if request.holdout is None else request.holdout
    if holdout < FEWEST:
        raise UserError(
            f"--holdout {holdout}: images are compared with these; give {FEWEST} at least, better a thousand"
        )
    real = load_images(data)
    train, held_out = split(real, holdout)
    if len(train) < FEWEST:
        raise UserError(
            f"--holdout {holdout} leaves {len(train)} of {len(real)} images for the first row; leave {FEWEST} at least"
        )
    first = ImageSet(train.images[:_YARDSTICK], train.labels[:_YARDSTICK])
    yardstick = of_arrays("training images", first)
    return Real(of_arrays(f"--data {data}", held_out), f"{data}, {holdout:,} held out", [yardstick])


def _metrics(request: Request, moments_only: bool, device: torch.device) -> tuple[list[str], LogRatio | None]:
    """The names of the metrics, and who is asked for the log-ratio, or None.

    Raises:
        UserError: unknown ones, or such as cannot be had here.
    """
    wanted = list(METRICS) if request.metrics is None else [name.strip() for name in request.metrics.split(",")]
    if unknown := [name for name in wanted if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]!r}: there are {', '.join(METRICS)}")
    reasons = {}
    if moments_only:
        why = f"needs images of the reference, and {request.reference} holds moments alone"
        reasons = dict.fromkeys(OF_IMAGES, why)
    asked = None
    if request.features is not None:
        reasons["log_ratio"] = "is that of a bundle's discriminator, and the features are not the bundle's"
    elif "log_ratio" in wanted:
        asked = LogRatio(bundles.read(request.bundle), device)
        if not asked.there:
            asked, reasons["log_ratio"] = None, f"needs a discriminator of images; bundle {request.bundle} has none"
    if request.metrics and (unfit := [name for name in wanted if name in reasons]):
        raise UserError(f"--metrics {unfit[0]}: it {reasons[unfit[0]]}")
    return [name for name in METRICS if name in wanted and name not in reasons], asked
