"""Sets of images in every form: what is read, part by part, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dgfast.errors import UserError
from dgfast.evaluation import npz
from dgfast.evaluation.images import Images, of_arrays, open_images
from dgfast.outputs import LABEL, write_adm
from dgfast.training.data import ImageSet
from tests.evaluation.conftest import Folder, noise


def _all(images: Images) -> np.ndarray:
    parts = [part for part, _ in images.parts()]
    assert len(images) == sum(map(len, parts))
    return np.concatenate(parts)


def test_shards_are_read_in_parts_with_their_seeds(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.evaluation.images._MOST_IMAGES", 4)
    pixels = noise(10)
    images = open_images(folder("drawn", pixels, first=100))
    assert np.array_equal(_all(images), pixels) and images.shape == (8, 8, 3)
    assert [len(part) for part, _ in images.parts()] == [4, 4, 2]
    assert images.seeds is not None and images.seeds.tolist() == list(range(100, 110))
    assert dict(images.settings) == {"bundle": "drawn"}


def test_large_images_are_read_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgfast.evaluation.images._MOST_BYTES", 2 * 8 * 8 * 3)
    images = of_arrays("real", ImageSet(noise(5), np.arange(5)))
    assert [len(part) for part, _ in images.parts()] == [2, 2, 1]


def test_pictures_are_read_whatever_their_folders_and_names(tmp_path: Path) -> None:
    pixels = noise(4)
    names = "b/one.png", "a/two.png", "grid.png", "000000/000007.png"
    for name, picture in zip(names, pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
    by_seed = open_images(tmp_path)
    assert by_seed.seeds is not None and by_seed.seeds.tolist() == [7]
    (tmp_path / names[3]).unlink()
    plain = open_images(tmp_path)
    assert np.array_equal(_all(plain), pixels[[1, 0]]) and plain.seeds is None


def test_pictures_of_a_palette_are_read_in_colour(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4, 3), (200, 10, 30), np.uint8)).quantize(4).save(tmp_path / "1.png")
    assert _all(open_images(tmp_path))[0, 0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize("labelled", [True, False])
def test_adms_file_is_read_alone_and_in_a_folder(tmp_path: Path, labelled: bool) -> None:
    pixels, labels = noise(6), np.arange(6) if labelled else np.full(6, -1)
    path = tmp_path / "samples_6x8x8x3.npz"
    with path.open("wb") as file:
        write_adm(file, iter([(pixels, labels)]), 6)
    for source in (path, tmp_path):
        images = open_images(source)
        assert np.array_equal(_all(images), pixels) and images.seeds is None
        assert np.concatenate([part for _, part in images.parts()]).tolist() == labels.tolist()


def test_grey_arrays_without_channels_have_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=noise(3, channels=1)[..., 0])
    assert open_images(tmp_path / "grey.npz").shape == (8, 8, 1)


# Mistakes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"latents": np.zeros((3, 4, 8, 8), np.float32)}, "no images.*latents are judged once they are decoded"),
        ({"images": np.zeros((3, 8, 8, 3), np.float32)}, r"images must be uint8 \[N, H, W, C\]; found float32"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "images must be uint8"),
        ({"images": noise(3), "labels": np.arange(4)}, "labels must be 3 whole numbers"),
        ({"images": noise(3), "labels": np.zeros(3)}, "labels must be 3 whole numbers; found float64"),
        ({"images": np.array([{}])}, "such as Python objects"),
        ({"images": np.asfortranarray(noise(3))}, "stored column by column"),
    ],
)
def test_an_npz_of_something_else_is_one_line(arrays: dict[str, np.ndarray], complaint: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"odd.npz: .*{complaint}") as error:
        _all(open_images(tmp_path / "odd.npz"))
    assert "\n" not in str(error.value)


def test_a_torn_file_is_one_line(tmp_path: Path) -> None:
    """Cut short at many places; a claimed size is never allocated before its bytes are there."""
    path = tmp_path / "torn.npz"
    np.savez(path, images=noise(3), labels=np.arange(3))
    whole = path.read_bytes()
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"torn\.npz: not an npz file"):
            npz.headers(path)


def test_images_of_different_sizes_are_one_line(folder: Folder, tmp_path: Path) -> None:
    drawn = folder("drawn", noise(3))
    np.savez(drawn / "images-00001.npz", images=noise(3, side=4))
    with pytest.raises(UserError, match="drawn: images of different sizes or channels"):
        open_images(drawn)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, picture in {"a": noise(1)[0], "b": noise(1, side=4)[0]}.items():
        Image.fromarray(picture).save(pictures / f"{name}.png")
    with pytest.raises(UserError, match="pictures: images of different sizes"):
        _all(open_images(pictures))


@pytest.mark.parametrize("formats", [["npz"], ["png"], ["adm"], ["npz", "png"], ["png", "npz"]])
def test_files_that_are_not_what_the_manifest_noted_are_one_line(formats: list[str], tmp_path: Path) -> None:
    from dgfast.chunks import Chunks
    from dgfast.job_folder import JobFolder
    from dgfast.outputs import Drawn
    from dgfast.ranges import Ranges

    chunks = Chunks(Ranges([(0, 7)]), None, 5)
    job = JobFolder(tmp_path / "out", {"seeds": "0-7", "batch": 5}, chunks, formats)
    with job.opened({}):
        for chunk in chunks:
            job.add(Drawn(chunk, None, {"images": noise(8)[list(chunk.seeds)]}))
        job.finish()
        job.manifest.end()
    assert np.array_equal(_all(open_images(job.path)), noise(8))
    file = next(path for path in sorted(job.path.rglob("*")) if path.suffix in (".npz", ".png"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"is damaged: its checksum is not that of manifest\.json") as error:
        open_images(job.path)
    assert str(job.path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "I;16", "F"])
def test_pictures_of_other_than_eight_bits_are_one_line(mode: str, tmp_path: Path) -> None:
    pixels = {"1": np.eye(8, dtype=bool), "I;16": np.eye(8, dtype=np.uint16), "F": np.eye(8, dtype=np.float32)}
    for name in ("1.png", "2.png"):
        picture = Image.fromarray(pixels[mode])
        picture.save(tmp_path / name, format="TIFF" if mode == "F" else "PNG")
    with pytest.raises(
        UserError, match=rf"1\.png: not a file of images \(its pixels are {mode}; save them with 8 bits a channel"
    ):
        open_images(tmp_path)


def test_the_picture_that_differs_is_named(tmp_path: Path) -> None:
    for name, channels in (("000000.png", 1), ("000001.png", 1), ("000002.png", 4)):
        Image.fromarray(noise(1, channels=channels)[0].squeeze()).save(tmp_path / name)
    with pytest.raises(UserError, match=r"channels of 000000\.png are 8 x 8 x 1, those of 000002\.png 8 x 8 x 4$"):
        _all(open_images(tmp_path))


def test_a_class_that_no_number_holds_is_one_line(tmp_path: Path) -> None:
    said = PngImagePlugin.PngInfo()
    said.add_text(LABEL, "9" * 30)
    Image.fromarray(noise(1)[0]).save(tmp_path / "1.png", pnginfo=said)
    with pytest.raises(UserError, match=r"1\.png: not a file of images"):
        open_images(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "/dev/null"])
def test_what_is_neither_folder_nor_file_is_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of images, and no npz file of them, is there"):
        open_images(tmp_path / path)


@pytest.mark.parametrize(
    "job",
    [
        {"seeds": "5-1", "batch": 2},
        {"seeds": ["a"], "batch": 2},
        {"seeds": "0-2", "batch": 2, "formats": 5},
        {"seeds": "0-2", "batch": 2, "formats": [[]]},
        {"seeds": "0-999999999999", "batch": 10**12, "formats": ["png"]},
    ],
)
def test_a_manifest_with_nonsense_is_one_line(job: dict[str, object], folder: Folder) -> None:
    drawn = folder("drawn", noise(3))
    (drawn / "manifest.json").write_text(json.dumps({"images": 3, "job": job, "chunks": {"0": "a"}}))
    with pytest.raises(UserError, match=r"drawn/manifest\.json is damaged \(.*\); move it elsewhere"):
        open_images(drawn)


def test_a_folder_in_the_manifests_place_says_nothing(folder: Folder) -> None:
    drawn = folder("drawn", noise(3))
    (drawn / "manifest.json").unlink()
    (drawn / "manifest.json").mkdir()
    assert len(open_images(drawn)) == 3


def test_a_manifest_of_anything_is_no_reason_to_fail(folder: Folder) -> None:
    drawn = folder("drawn", noise(3))
    contents: tuple[dict[str, object], ...] = (
        {},
        {"job": []},
        {"chunks": {"0": "a"}},
        {"chunks": [], "job": {"batch": 2}},
        {"products": []},
    )
    for content in contents:
        (drawn / "manifest.json").write_text(json.dumps(content))
        assert len(open_images(drawn)) == 3
