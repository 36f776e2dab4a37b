"""Networks whose features images are compared in: a bundle's own, or a TorchScript file's.

TorchScript is a program: torch runs its operators, and no Python. It is run only where somebody names the file.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.bounds import open_file
from dgfast.bundle import Bundle
from dgfast.errors import UserError, one_line
from dgfast.files import sha256
from dgfast.nets.features import FeatureNet

RANGES = ("0,255", "0,1", "-1,1", "imagenet")
"""In which values a network reads pixels; "imagenet": from 0 to 1, less ImageNet's mean, over its deviation."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
_DIGITS = 12  # of a checksum in a name
_ASKED = "return_features"  # by StyleGAN's, EDM's and clean-fid's Inception, which gives logits without it


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    Attributes:
        name: of the network, for tables. channels: of the images that it reads; None: colour, grey in its place.
        device: where it is. call: pixels float32 [B, C, H, W] from 0 to 255 -> features [B, D].
    """

    name: str
    channels: int | None
    device: torch.device
    call: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 [B, H, W, C] -> features float32 [B, D], on the network's device.

        Raises:
            UserError: the network fails, or gives something else.
        """
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        if self.channels is None and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        with torch.no_grad():
            features = self.call(pixels)
        if not features.isfinite().all():
            raise UserError(
                f"features of {self.name}: not all of them are finite numbers; see --features-range for what it reads"
            )
        return features

    def width(self, shape: tuple[int, int, int]) -> int:
        """How many numbers a feature of an image of that height, width and channels has.

        Raises:
            UserError: the network does not read such images.
        """
        return self(torch.zeros(2, *shape, dtype=torch.uint8)).shape[1]


def of_bundle(bundle: Bundle, device: torch.device) -> Extractor:
    """The features of the bundle's own classifier of clean images.

    Raises:
        UserError: it has none.
    """
    net = bundle.load("features", device)
    if not isinstance(net, FeatureNet):
        raise UserError(f"bundle {bundle.name}: a {type(net).__name__} has no features to compare images in")
    return Extractor(
        f"{bundle.name}'s own classifier", net.in_channels, device, lambda pixels: net.features(pixels / 127.5 - 1)
    )


def of_file(path: Path, values: str | None, size: int | None, device: torch.device) -> Extractor:
    """The features that a TorchScript file computes of colour images; grey ones are given three equal channels.

    Args:
        values: one of `RANGES`; None for an Inception as StyleGAN, EDM and clean-fid have it, which is known by the
            argument `return_features` that it takes, reads 0 to 255 and resizes by itself.
        size: side to which images are resized first (bicubic, antialiased); None leaves them as they are.

    Raises:
        UserError: no TorchScript, or one whose values nobody has said.
    """
    net = _script(path, device)
    if not hasattr(net, "forward"):
        raise UserError(f"--features {path}: it has no forward; script a module that has one")
    names = [argument.name for argument in net.forward.schema.arguments]
    asked = {_ASKED: True} if _ASKED in names else {}
    if values is None and not asked:
        raise UserError(
            f"--features {path}: which values its pixels have is not in the file; give --features-range "
            f"{' or '.join(RANGES)} (and --features-size, if it reads images of one size)"
        )

    def call(pixels: Tensor) -> Tensor:
        if size is not None:
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        try:
            features = net(_in_range(pixels, values or RANGES[0]), **asked)
        except (RuntimeError, torch.jit.Error) as error:  # the second one: of what the script itself raises
            reason = one_line(_last_line(error), most=160)
            shape = " x ".join(map(str, pixels.shape[1:]))
            raise UserError(f"--features {path}: it fails on images {shape} ({reason}); see --features-size") from error
        if not isinstance(features, Tensor):
            raise UserError(
                f"--features {path}: it gives {type(features).__name__} for {len(pixels)} images, not features [N, D]"
            )
        if not _are_features(features, len(pixels)):
            raise UserError(
                f"--features {path}: it gives {str(features.dtype).removeprefix('torch.')} {list(features.shape)} for "
                f"{len(pixels)} images, not features [N, D]"
            )
        return features.flatten(1).float()

    return Extractor(f"{path.name} (sha256 {sha256(path)[:_DIGITS]})", None, device, call)


def _are_features(values: Tensor, images: int) -> bool:
    """Real numbers [N, D], or [N, D, 1, 1], as a pooling layer leaves them."""
    return (
        values.ndim >= 2
        and len(values) == images
        and values.shape[1] > 0
        and math.prod(values.shape[2:]) == 1
        and not values.is_complex()
    )


def _script(path: Path, device: torch.device) -> Any:  # noqa: ANN401  # torch gives the attributes of scripts no types
    with open_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch would have everybody export anew
        try:
            net = torch.jit.load(file, map_location=device)
        except (RuntimeError, ValueError, EOFError) as error:
            raise UserError(
                f"--features {path}: not a TorchScript file; save one by torch.jit.script or torch.jit.trace"
            ) from error
    return net.eval()


def _in_range(pixels: Tensor, values: str) -> Tensor:
    """Pixels from 0 to 255 in the values of one of `RANGES`."""
    if values == "0,255":
        return pixels
    if values == "-1,1":
        return pixels / 127.5 - 1
    if values == "0,1":
        return pixels / 255
    if pixels.shape[1] != len(_MEAN):
        raise UserError(
            f"--features-range imagenet is that of colour images, and these have {pixels.shape[1]} channels"
        )
    return (pixels / 255 - _column(_MEAN, pixels)) / _column(_STD, pixels)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(numbers).view(-1, 1, 1)


def _last_line(error: Exception) -> str:
    """Of a script's error, whose first lines are where in the script it was."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
