"""Features of TorchScript files: what pixels a network is given, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgfast.errors import UserError
from dgfast.evaluation import features, reference
from dgfast.evaluation.images import of_arrays
from dgfast.training.data import ImageSet
from tests.evaluation.conftest import Detector, Plain, features_of, noise, saved, seeded

_CPU = torch.device("cpu")


def test_an_inception_is_asked_for_its_features_of_pixels_as_they_are(detector: Path) -> None:
    extractor = features.of_file(detector, None, None, _CPU)
    images = noise(5)
    np.testing.assert_allclose(extractor(torch.from_numpy(images)), features_of(images), rtol=1e-5, atol=1e-6)
    grey = noise(5, channels=1)
    np.testing.assert_allclose(extractor(torch.from_numpy(grey)), features_of(grey.repeat(3, 3)), rtol=1e-5, atol=1e-6)
    assert extractor.name.startswith("inception.pt (sha256 ") and extractor.width((8, 8, 3)) == 6


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [("0,255", 0.0, 255.0), ("0,1", 0.0, 1.0), ("-1,1", -1.0, 1.0), ("imagenet", -0.485 / 0.229, (1 - 0.485) / 0.229)],
)
def test_pixels_have_the_values_that_were_said(values: str, low: float, high: float, tmp_path: Path) -> None:
    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0].flatten(1)[:, :2]

    extractor = features.of_file(saved(Corner(), tmp_path / "corner.pt"), values, None, _CPU)
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    images[0, 0, 1] = 255
    assert extractor(images)[0].tolist() == pytest.approx([low, high], rel=1e-5)


def test_images_are_resized_where_a_size_was_said(tmp_path: Path) -> None:
    class Size(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((images.shape[0], 2), float(images.shape[-1]))

    path = saved(Size(), tmp_path / "size.pt")
    assert features.of_file(path, "0,1", 14, _CPU)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))[0, 0] == 14
    assert features.of_file(path, "0,1", None, _CPU)(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))[0, 0] == 8


def test_what_nobody_said_of_a_network_is_asked_for(tmp_path: Path) -> None:
    path = saved(seeded(Plain), tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"give --features-range 0,255 or 0,1 or -1,1 or imagenet"):
        features.of_file(path, None, None, _CPU)
    assert features.of_file(path, "-1,1", None, _CPU).width((8, 8, 3)) == 6


@pytest.mark.parametrize("content", ["text", "state dict", "empty", "folder"])
def test_a_file_that_is_no_script_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if content == "folder":
        path.mkdir()
    elif content == "state dict":
        torch.save(seeded(Detector).state_dict(), path)
    else:
        path.write_text("no script" if content == "text" else "")
    with pytest.raises(UserError, match=r"not a TorchScript file|it is a folder") as error:
        features.of_file(path, None, None, _CPU)
    assert "\n" not in str(error.value)


class _Infinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 0


class _Raises(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if bool(images.sum() >= 0):
            raise Exception("of its own\nsecond line")  # as people write it, which is no RuntimeError
        return images


class _Map(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class _Nothing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :0]


class _Complex(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.fft.fft(images.flatten(1))


class _Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.sum()


class _Two(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


@pytest.mark.parametrize(
    ("net", "complaint"),
    [
        (_Infinite(), "not all of them are finite"),
        (_Flat(), r"it gives float32 \[\] for 2 images"),
        (_Two(), "it gives tuple"),
        (_Raises(), r"it fails on images 3 x 4 x 4 \(.*second line\)"),
        (_Map(), r"it gives float32 \[2, 3, 4, 4\] for 2 images, not features \[N, D\]"),
        (_Nothing(), r"it gives float32 \[2, 0\]"),
        (_Complex(), r"it gives complex64 \[2, 48\]"),
    ],
)
def test_what_is_no_features_is_one_line(net: nn.Module, complaint: str, tmp_path: Path) -> None:
    extractor = features.of_file(saved(net, tmp_path / "net.pt"), "0,1", None, _CPU)
    with pytest.raises(UserError, match=complaint) as error:
        extractor.width((4, 4, 3))
    assert "\n" not in str(error.value)


def test_a_pooling_layer_may_leave_sides_of_one_pixel(tmp_path: Path) -> None:
    path = saved(nn.AdaptiveAvgPool2d(1), tmp_path / "pool.pt")
    assert features.of_file(path, "0,1", None, _CPU).width((4, 4, 3)) == 3


def test_a_script_without_forward_is_one_line(tmp_path: Path) -> None:
    class Other(nn.Module):
        @torch.jit.export
        def other(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(UserError, match=r"net\.pt: it has no forward; script a module that has one"):
        features.of_file(saved(Other(), tmp_path / "net.pt"), "0,1", None, _CPU)


class _ByContent(nn.Module):
    """As many numbers as the brightest pixel of all says."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : int(images.max()) + 1]


@pytest.mark.parametrize(
    ("net", "complaint"),
    [(_ByContent(), "features of one image have 3 numbers, and those of others 1"), (_Map(), "are the same for all")],
)
def test_features_that_compare_nothing_are_one_line(
    net: nn.Module, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgfast.evaluation.images._MOST_IMAGES", 4)
    pixels = np.zeros((8, 1, 1, 3), np.uint8)
    pixels[4:] = 9 if isinstance(net, _ByContent) else 0
    real = of_arrays("real", ImageSet(pixels, np.zeros(8)))
    extractor = features.of_file(saved(net, tmp_path / "net.pt"), "0,255", None, _CPU)
    with pytest.raises(UserError, match=complaint):
        reference.of_images(real, "real", extractor, 8, lambda count: None)


def test_a_network_that_fails_on_the_images_is_one_line(detector: Path) -> None:
    extractor = features.of_file(detector, None, None, _CPU)
    with pytest.raises(UserError, match=r"it fails on images 2 x 8 x 8 \(") as error:
        extractor.width((8, 8, 2))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="that of colour images, and these have 2 channels"):
        features.of_file(detector, "imagenet", None, _CPU).width((8, 8, 2))
