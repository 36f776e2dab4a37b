"""Measure how good the images of `dgfast sample` are.

Compares each folder's shards with held-out real images in the features of the bundle's own small classifier: Frechet
and kernel distance (torchmetrics), precision, recall, density and coverage (prdc), and the mean log-ratio of the
bundle's discriminator. The first row is the yardstick: training images in the place of generated ones. Distances in
these features are for comparison with each other only, not with published Inception figures.
"""

import io
import json
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dgfast.options import Command, Group, option

if TYPE_CHECKING:
    import torch

    from dgfast.training.data import ImageSet

_NEAREST_K = 5  # prdc's recommendation
_LOG_RATIO_SIGMAS = (0.05, 0.2, 0.5, 1.0, 2.0)
_YARDSTICK = 2000  # training images in the first row
_CHUNK = 250  # images a network call


@click.command(cls=Command, help=__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--bundle", group=Group.INPUT, default="mnist32", show_default=True, help="Whose features and discriminator judge."
)
@option(
    "--data", group=Group.INPUT, default="mnist", show_default=True, help="`mnist`, or an npz with images and labels."
)
@option("--holdout", group=Group.INPUT, default=1000, show_default=True, help="Held-out images, as in training.")
@option("--json", "report", group=Group.OUTPUT, type=click.Path(path_type=Path), help="Write the numbers there too.")
@option("--device", group=Group.RUNTIME, help="cpu or cuda; default: what is there.")
def main(
    folders: tuple[Path, ...], bundle: str, data: str, holdout: int, report: Path | None, device: str | None
) -> None:
    from dgfast.extras import require

    require("torchmetrics", "prdc")
    from dgfast import bundle as bundles
    from dgfast.devices import pick_device
    from dgfast.image_folder import read_images
    from dgfast.training.data import ImageSet, load_images, split

    found = bundles.read(bundle)
    train, held_out = split(load_images(data), holdout)
    yardstick = ImageSet(train.images[:_YARDSTICK], train.labels[:_YARDSTICK])
    sets = {"training images": yardstick} | {str(folder): ImageSet(*read_images(folder)) for folder in folders}
    judge = _Judge(found, held_out, pick_device(device))
    rows = {name: judge(images) for name, images in sets.items()}
    _print_table(rows)
    if report is not None:
        report.write_text(json.dumps(rows, indent=1) + "\n")


class _Judge:
    """The metrics of one image set against the held-out images."""

    def __init__(self, bundle: Any, held_out: "ImageSet", device: "torch.device") -> None:
        from dgfast.networks import load

        self._held_out, self._device = held_out, device
        self._net = bundle.load("features", device)
        self._networks = load(bundle, device)
        self._real = self._features(held_out)

    def __call__(self, images: "ImageSet") -> dict[str, float]:
        from prdc import compute_prdc

        fake = self._features(images)
        with redirect_stdout(io.StringIO()):  # prdc prints its arguments
            scores = compute_prdc(self._real.numpy(), fake.numpy(), nearest_k=_NEAREST_K)
        found = {"images": len(images), **self._distances(images), **{k: float(v) for k, v in scores.items()}}
        if self._networks.discriminator is not None:
            found["log_ratio"] = self._mean_log_ratio(images)
        return found

    def _features(self, images: "ImageSet") -> "torch.Tensor":
        import torch

        with torch.no_grad():
            chunks = images.tensors()[0].split(_CHUNK)
            return torch.cat([self._net.features(chunk.to(self._device)).cpu() for chunk in chunks])

    def _distances(self, images: "ImageSet") -> dict[str, float]:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        torch.manual_seed(0)  # the kernel distance draws subsets
        extractor = _feature_module(self._net)
        subset = min(500, len(images) // 2, len(self._held_out) // 2)
        frechet = FrechetInceptionDistance(feature=extractor).to(self._device)
        with warnings.catch_warnings():  # that it keeps all features: a few thousand small ones
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
            kernel = KernelInceptionDistance(feature=extractor, subset_size=subset).to(self._device)
        for data, real in ((self._held_out, True), (images, False)):
            for chunk in data.tensors()[0].split(_CHUNK):
                frechet.update(chunk.to(self._device), real=real)
                kernel.update(chunk.to(self._device), real=real)
        return {"frechet": float(frechet.compute()), "kernel": float(kernel.compute()[0])}

    def _mean_log_ratio(self, images: "ImageSet") -> float:
        """Mean of the gated log-ratio over images and over noise levels."""
        import torch
        from torch.nn import functional as F

        from dgfast.errors import UserError
        from dgfast.guidance import DiscriminatorGuidance
        from dgfast.training.classifier import to_vp

        assert self._networks.discriminator is not None
        guidance = DiscriminatorGuidance(self._networks.discriminator, time=self._networks.time)
        pixels, labels = images.tensors()
        classes = self._networks.denoiser.label_dim
        if classes and not bool(((labels >= 0) & (labels < classes)).all()):
            raise UserError(f"the discriminator judges classes 0 to {classes - 1}; other labels were found")
        torch.manual_seed(0)
        total = 0.0
        with torch.no_grad():
            for level in _LOG_RATIO_SIGMAS:
                for x, y in zip(pixels.split(_CHUNK), labels.split(_CHUNK), strict=True):
                    sigma = torch.full((len(x),), level, dtype=torch.float64, device=self._device)
                    rows = F.one_hot(y, classes).float().to(self._device) if classes else None
                    total += float(guidance.log_ratio(to_vp(x.to(self._device), sigma), sigma, rows).sum())
        return total / len(pixels) / len(_LOG_RATIO_SIGMAS)


def _feature_module(net: Any) -> Any:
    """`net` as torchmetrics wants it: images in, features out, their number as `num_features`."""
    from torch import Tensor, nn

    class Features(nn.Module):
        num_features: int = net.num_features

        def forward(self, images: Tensor) -> Tensor:
            return net.features(images)

    return Features().eval()


def _print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    click.echo(" " * width + "".join(f"{column:>12}" for column in columns))
    for name, row in rows.items():
        cells = (f"{row[c]:>12d}" if isinstance(row[c], int) else f"{row[c]:>12.4f}" for c in columns)
        click.echo(f"{name:<{width}}" + "".join(cells))


if __name__ == "__main__":
    main()
