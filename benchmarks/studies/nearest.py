"""python -m benchmarks.studies.nearest SAMPLES --data DATA: are samples more than copies of training images?

Prints how far samples are from the nearest training image, and how far the held-out images are, which nobody can have
learned by heart: a network that repeats its training images is far closer than they. Distances are root mean squares
over the pixels, in levels of 255. The picture has samples, and under each its nearest training image.
"""

from pathlib import Path

import click
import numpy as np

from dgfast.outputs import save_grid
from dgfast.training.data import load_images, split


@click.command(help=__doc__)
@click.argument("samples")
@click.option("--data", required=True, help="What the bundle was trained on, as `dgfast train` reads it.")
@click.option("--holdout", default=1000, show_default=True, help="Images that the training left out.")
@click.option("--count", default=50, show_default=True, help="Samples in the picture.")
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write.")
def main(samples: str, data: str, holdout: int, count: int, out: Path | None) -> None:
    drawn = load_images(samples).images
    training, held_out = split(load_images(data), holdout)
    click.echo("| | images | distance to the nearest training image, 1 % | 10 % | median | 90 % |")
    click.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, images in (("samples", drawn), ("held-out images", held_out.images)):
        shares = np.quantile(nearest(images, training.images)[1], (0.01, 0.1, 0.5, 0.9))
        click.echo(f"| {name} | {len(images)} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    if out is not None:
        shown = drawn[:count]
        save_grid(np.concatenate([shown, training.images[nearest(shown, training.images)[0]]], axis=1), out)


def nearest(images: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest training image of each of `images`, uint8 [N, H, W, C], and the distance: [N] each."""
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (images, training))
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T  # integers below 2^53: exact
    return square.argmin(1), np.sqrt(square.min(1) / a.shape[1])


if __name__ == "__main__":
    main()
