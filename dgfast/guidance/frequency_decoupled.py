"""Frequency-decoupled guidance, FDG (Sadat et al., arXiv 2506.19713): a scale for each band of a pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.adaptive_projected import projected
from dgfast.guidance.options import option
from dgfast.guidance.unconditional import UnconditionalGuidance, interval_option

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

_KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_LEAST = 4  # pixels that a band has at least which is halved again: its blur reflects two of them

Rows = tuple[tuple[float, ...], ...]


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """The bands of the Laplacian pyramid of images [B, C, H, W] (Burt and Adelson, 1983), high frequencies first.

    Band i is [B, C, H / 2^i, W / 2^i]. Halving blurs by the binomial kernel of five and takes means of 2 x 2;
    doubling is bilinear, and blurred too. Each is a matrix for the rows and one for the columns.

    Raises:
        UserError: the size does not divide by 2^(levels - 1), or is too small.
    """
    require_size(images.shape[2], levels)
    require_size(images.shape[3], levels)
    bands = []
    for _ in range(levels - 1):
        smaller = _resized(images, _halving)
        bands.append(images - _resized(smaller, _doubling))
        images = smaller
    return [*bands, images]


def rebuilt(bands: Sequence[Tensor]) -> Tensor:
    """The images [B, C, H, W] of a `pyramid`."""
    images = bands[-1]
    for band in bands[-2::-1]:
        images = band + _resized(images, _doubling)
    return images


def decoupled(
    denoised: Tensor, reference: Tensor, weights: Sequence[float | Tensor], parallel: Sequence[float] | None = None
) -> Tensor:
    """denoised - reference [B, C, H, W] with a weight for each band, high frequencies first.

    Args:
        parallel: of each band, the share of the part along that band of `denoised`; None: all of it.
    """
    bands = pyramid(denoised - reference, len(weights))
    if parallel is not None:
        along = pyramid(denoised, len(weights))
        bands = [projected(b, p, eta, 0.0) for b, p, eta in zip(bands, along, parallel, strict=True)]
    return rebuilt([weight * band for weight, band in zip(weights, bands, strict=True)])


def require_size(size: int, levels: int) -> None:
    """Raises UserError for a side of an image that a pyramid of so many levels cannot halve."""
    times = 2 ** (levels - 1)
    if size % times or (levels > 1 and 2 * size < _LEAST * times):
        raise UserError(
            f"frequency-decoupled guidance in {levels} bands needs images whose sides divide by {times}, "
            f"and of at least {_LEAST * times // 2} pixels; these have {size}"
        )


@dataclass(frozen=True, eq=False)
class FrequencyDecoupledGuidance(UnconditionalGuidance):
    """D' = D_c + (scale - 1) (high frequencies of D_c - D_u) + (scale_low - 1) (low ones).

    Attributes:
        scale, scale_low: 1 guides nothing.
        parallel: share of what is parallel to the band of the prediction, as APG's eta; 1 keeps all of it.
    """

    @dataclass(frozen=True)
    class Options:
        fdg_scale_high: float = option(1.0, "Scale of high frequencies; 1 turns it off.", "s_high", attribute="scale")
        fdg_scale_low: float = option(1.0, "Scale of low frequencies; 1 turns it off.", "s_low", attribute="scale_low")
        fdg_parallel: float = option(1.0, "Share of what is parallel to the prediction, a band.", "eta")
        guidance_interval: tuple[float, float] = interval_option()

    scale_low: float | Tensor = 1.0
    parallel: float = 1.0

    name = "frequency-decoupled guidance"
    formula = "D + (s_high - 1) high(D - D_u) + (s_low - 1) low(D - D_u)"
    use = "for details at large scales, colours at small ones"

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> FrequencyDecoupledGuidance:
        denoiser = cls.conditional(networks)
        sides = networks.denoiser.img_resolution
        for side in sides if isinstance(sides, tuple) else (sides,):
            require_size(side, 2)
        scales = config.fdg_scale_high, config.fdg_scale_low
        return cls(denoiser, scales[0], config.guidance_interval, scales[1], config.fdg_parallel)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale != 1 or self.scale_low != 1) and self.reaches(sigma_low, sigma_high)

    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        weights = self.scale - 1, self.scale_low - 1
        parallel = None if self.parallel == 1 else (self.parallel,) * 2
        return decoupled(denoised, unconditional, weights, parallel), torch.ones_like(sigma)


def _resized(images: Tensor, rows: Callable[[int], Rows]) -> Tensor:
    """The images with the matrix of that name for each size put to their columns and rows."""
    import torch

    for _ in range(2):  # along the width, and turned by that, along the height
        matrix = torch.tensor(rows(images.shape[-1]), dtype=images.dtype, device=images.device)
        images = (images @ matrix.T).transpose(-1, -2)
    return images


@cache
def _halving(size: int) -> Rows:
    blur = _blur(size)
    return tuple(tuple((a + b) / 2 for a, b in zip(*blur[2 * i : 2 * i + 2], strict=True)) for i in range(size // 2))


@cache
def _doubling(size: int) -> Rows:
    rows = []
    for blurred in _blur(2 * size):
        row = [0.0] * size
        for at in (at for at, share in enumerate(blurred) if share):
            near, far = at // 2, at // 2 + (1 if at % 2 else -1)
            row[near] += 0.75 * blurred[at]
            row[min(max(far, 0), size - 1)] += 0.25 * blurred[at]
        rows.append(tuple(row))
    return tuple(rows)


def _blur(size: int) -> Rows:
    """The kernel at every pixel, reflected at the borders without doubling them."""
    rows = []
    for i in range(size):
        row = [0.0] * size
        for offset, share in zip(range(-2, 3), _KERNEL, strict=True):
            at = abs(i + offset)
            row[min(at, 2 * (size - 1) - at)] += share
        rows.append(tuple(row))
    return tuple(rows)
