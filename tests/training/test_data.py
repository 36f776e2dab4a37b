"""What may be trained on: files and folders, their labels and classes, and what is said of others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgfast.errors import UserError
from dgfast.training.data import ImageSet, labelled_as, load_images, split

_LABELS = np.arange(6) % 2
_IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
_LATENTS = np.random.default_rng(1).normal(size=(6, 4, 2, 2)).astype(np.float32)


def pictures(folder: Path, *places: str, mode: str = "L") -> Path:
    """A picture in each of these subfolders, of its own grey."""
    for index, place in enumerate(places):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new(mode, (4, 4), index).save(folder / place / f"{index}.png")
    return folder


def refused(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_images(str(source))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    data = load_images(str(pictures(tmp_path / "names", "cat", "ant", "dog")))
    assert data.class_names == ("ant", "cat", "dog")
    assert dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}
    data = load_images(str(pictures(tmp_path / "numbers", "10", "9", "100")))
    assert data.class_names == ("9", "10", "100")
    assert dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 2}


def test_folders_that_leave_a_class_open_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "empty", "a", "c")
    (folder / "b").mkdir()
    assert "empty/b: no pictures there" in refused(folder)
    (folder / "b").rename(folder / ".b")  # hidden ones are nobody's class
    assert load_images(str(folder)).class_names == ("a", "c")
    assert "0.png beside them" in refused(pictures(folder, "."))
    assert "pictures of 4 channels" in refused(pictures(tmp_path / "clear", "a", "b", mode="RGBA"))
    assert "no images there" in refused(pictures(tmp_path / "deep", "one/two").parent / "deep")
    np.savez(pictures(tmp_path / "both", "a") / "images-0.npz", images=_IMAGES, labels=_LABELS)
    assert "both pictures and images-0.npz" in refused(tmp_path / "both")
    Image.new("L", (3, 3)).save(pictures(tmp_path / "sides", "a", "b") / "b" / "odd.png")
    assert "a/0.png are 4 x 4 x 1, those of b/odd.png 3 x 3 x 1" in refused(tmp_path / "sides")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": _IMAGES, "labels": _LABELS + 0.5}, "not 0.5"),
        ({"images": _IMAGES, "labels": _LABELS * np.nan}, "not nan"),
        ({"images": _IMAGES, "labels": np.array(list("abcdef"))}, "not 'a'"),
        ({"images": _IMAGES, "labels": _LABELS - 3}, "label -3"),
        ({"images": _IMAGES, "labels": _LABELS + 10**12}, "label 1000000000000"),
        ({"images": _IMAGES[:0], "labels": _LABELS[:0]}, "no images"),
        ({"images": _IMAGES[:, :0], "labels": _LABELS}, "no images"),
        ({"latents": np.where(_LATENTS > 1.5, np.nan, _LATENTS), "labels": _LABELS}, "of 6 latents are not finite"),
    ],
    ids=["fractions", "nan", "text", "negative", "huge", "none", "flat", "latents"],
)
def test_npz_of_what_no_network_learns_from_is_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    assert message in refused(tmp_path / "data.npz")


def test_latents_beside_images_are_taken_where_they_are_preferred(tmp_path: Path) -> None:
    np.savez(tmp_path / "both.npz", images=_IMAGES, latents=_LATENTS, labels=_LABELS.astype(float))
    assert load_images(str(tmp_path / "both.npz")).images.dtype == np.uint8
    data = load_images(str(tmp_path / "both.npz"), prefer_latents=True)
    assert np.array_equal(data.tensors()[0].numpy(), _LATENTS) and data.labels.tolist() == _LABELS.tolist()
    np.savez(tmp_path / "latents-0.npz", latents=_LATENTS, labels=_LABELS)
    np.savez(tmp_path / "latents-1.npz", latents=_LATENTS[..., :1], labels=_LABELS)
    (tmp_path / "both.npz").unlink()
    assert "latents of different sizes" in refused(tmp_path)
    (tmp_path / "latents-1.npz").unlink()
    (tmp_path / "manifest.json").write_text('{"images": 9}')
    assert "holds 6 latents, its manifest promises 9" in refused(tmp_path)


def test_folders_get_the_labels_of_the_network_that_knows_their_names() -> None:
    data = ImageSet(_IMAGES[..., None], np.arange(6) % 2, ("cat", "dog"))
    assert labelled_as(data, ("ant", "dog", "cat"), 3, "data").labels.tolist() == [2, 1, 2, 1, 2, 1]
    assert labelled_as(data, ("x", "y"), 2, "data").labels.tolist() == data.labels.tolist()
    assert labelled_as(data, (), 0, "data") is data
    with pytest.raises(UserError, match="2 folders of classes, of which the score network has 3: name them"):
        labelled_as(data, ("x", "y", "z"), 3, "data")
    with pytest.raises(UserError, match="label 1; the score network knows classes 0 to 0"):
        labelled_as(ImageSet(data.images, data.labels), (), 1, "data")


def test_digest_tells_images_and_labels_apart_and_holdouts_are_kept() -> None:
    data = ImageSet(_IMAGES[..., None], _LABELS, ("a", "b"))
    same = ImageSet(_IMAGES[..., None].copy(), _LABELS.copy())
    others = [ImageSet(255 - data.images, data.labels), ImageSet(data.images, 1 - data.labels)]
    assert data.digest() == same.digest() and len({data.digest(), *(other.digest() for other in others)}) == 3
    assert {part.class_names for part in split(data, 2)} == {("a", "b")}
    for holdout in (0, -1):
        with pytest.raises(UserError, match="at least one image is needed to judge by"):
            split(data, holdout)
