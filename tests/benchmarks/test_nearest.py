"""The study `nearest`: what repeats its training images is told from what does not."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from benchmarks.studies.nearest import main, nearest

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)


def test_nearest_is_the_closest_of_all() -> None:
    index, distance = nearest(IMAGES[:7], IMAGES[7:])
    everything = IMAGES[:7, None].astype(float) - IMAGES[None, 7:]
    by_hand = np.sqrt((everything**2).mean((2, 3, 4)))
    np.testing.assert_array_equal(index, by_hand.argmin(1))
    np.testing.assert_allclose(distance, by_hand.min(1), rtol=1e-12)


def test_copies_are_at_distance_zero_and_their_originals_stand_under_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=np.zeros(40, np.int64))
    np.savez(tmp_path / "samples.npz", images=IMAGES, labels=np.zeros(40, np.int64))
    arguments = [str(tmp_path / "samples.npz"), "--data", str(tmp_path / "data.npz"), "--holdout", "8"]
    result = CliRunner().invoke(main, [*arguments, "--count", "36", "--out", str(tmp_path / "pairs.png")])
    assert result.exit_code == 0, result.output
    samples, held_out = ([float(cell) for cell in row.split("|")[3:7]] for row in result.output.splitlines()[2:])
    assert samples[0] == samples[2] == 0 < samples[3]  # a fifth of them was held out
    assert held_out[0] > 10
    pairs = np.asarray(Image.open(tmp_path / "pairs.png")).reshape(6, 8, 6, 4, 3).swapaxes(1, 2).reshape(36, 2, 4, 4, 3)
    np.testing.assert_array_equal(pairs[:, 0], IMAGES[:36])
    assert sum(np.array_equal(*pair) for pair in pairs) >= 28
