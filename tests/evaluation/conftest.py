"""A tiny network for features in a TorchScript file, and folders of images to judge by it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dgfast.outputs import write_images

WIDTH = 6


class Detector(nn.Module):
    """As StyleGAN's Inception: colour images from 0 to 255, features where they are asked for and logits elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDTH, 3, stride=2)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        features = self.convolution(images / 128 - 1).relu().mean(dim=(2, 3))
        return features if return_features else features[:, :1]


class Plain(Detector):
    """Without that argument."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.convolution(images).mean(dim=(2, 3))


def saved(net: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net.eval()).save(str(path))
    return path


def seeded(kind: type[Detector]) -> Detector:
    torch.manual_seed(3)
    return kind()


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `Detector`."""
    return saved(seeded(Detector), tmp_path_factory.mktemp("scripts") / "inception.pt")


def noise(count: int, channels: int = 3, side: int = 8, seed: int = 0, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (count, side, side, channels), dtype=np.uint8)


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """(name, images, first seed) -> a folder of one shard of them."""

    def make(name: str, images: np.ndarray, first: int = 0) -> Path:
        write_images(tmp_path / name, images, range(first, first + len(images)), None)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"images": len(images), "job": {"bundle": name}}))
        return tmp_path / name

    return make


def features_of(images: np.ndarray) -> np.ndarray:
    """What `Detector` gives of images uint8 [N, H, W, C], float64."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        features: Tensor = seeded(Detector)(pixels.expand(-1, 3, -1, -1), return_features=True)
    return features.double().numpy()
