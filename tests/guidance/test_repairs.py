"""Repairs of what mixing did to an image, against their definitions written down another way."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dgfast import GuidanceConfig, UserError
from dgfast.guidance import GUIDANCES, DynamicThreshold, PixelNorm, Renorm, Repair, Rescale
from dgfast.guidance.spaces import SPACES, prediction
from dgfast.guidance.thresholding import quantile
from tests.guidance.test_mixes import images

ALL = [Rescale(0.7), Rescale(1.0, "flow"), PixelNorm(0.8), Renorm(1.1), Renorm(1.0, "x0"), DynamicThreshold(0.9)]


@pytest.mark.parametrize("repair", ALL, ids=lambda repair: f"{type(repair).__name__}")
def test_repair_mends_each_sample_alone_and_nothing_where_it_is_off(repair: Any) -> None:
    plain, change, x, sigma = images()
    mixed = plain + 4 * (plain - change)
    whole = repair.repaired(x, sigma, mixed, plain)
    for k in range(len(x)):
        one = slice(k, k + 1)
        torch.testing.assert_close(repair.repaired(x[one], sigma[one], mixed[one], plain[one]), whole[one])
    assert (whole - mixed).abs().max() > 0.01
    weight = next(iter(type(repair).weights()))
    for zero in (0.0, torch.zeros(1)):  # a number, or an exported file's input
        off = replace(repair, **{weight: zero})
        assert torch.equal(off.repaired(x, sigma, mixed, plain), mixed)
    assert repair.active(0.0, 1.0) and not replace(repair, **{weight: 0.0}).active(0.0, 1.0)
    if not isinstance(repair, DynamicThreshold):
        assert torch.equal(repair.repaired(x, sigma, plain, plain), plain)


@pytest.mark.parametrize("space", SPACES)
def test_rescaling_gives_the_spread_back(space: str) -> None:
    plain, change, x, sigma = images()
    mixed = plain + 4 * (plain - change)
    before, after, whole, half = (
        prediction(space, each, x, sigma)
        for each in (plain, mixed, *(Rescale(f, space).repaired(x, sigma, mixed, plain) for f in (1.0, 0.5)))
    )
    torch.testing.assert_close(whole.std((1, 2, 3)), before.std((1, 2, 3)))
    torch.testing.assert_close(half, (whole + after) / 2)


@pytest.mark.parametrize("space", SPACES)
def test_norm_limits_hold_and_touch_nothing_below(space: str) -> None:
    plain, change, x, sigma = images()
    for factor in (0.1, 4.0):
        mixed = plain + factor * (plain - change)
        renormed = Renorm(1.2, space).repaired(x, sigma, mixed, plain)
        p, q, r = (prediction(space, each, x, sigma).flatten(1) for each in (plain, mixed, renormed))
        limit = 1.2 * p.norm(dim=1)
        torch.testing.assert_close(r.norm(dim=1), q.norm(dim=1).minimum(limit))
        torch.testing.assert_close(r / r.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True))
        pixels = PixelNorm(1.0).repaired(x, sigma, mixed, plain)
        torch.testing.assert_close(pixels.norm(dim=1), mixed.norm(dim=1).minimum(plain.norm(dim=1)))


def test_dynamic_threshold_is_a_quantile_of_each_image() -> None:
    _, _, x, sigma = images()
    bright = torch.cat([0.3 * x[:1] / x[:1].abs().max(), 5 * x[1:]])
    squeezed = DynamicThreshold(0.97).repaired(x, sigma, bright, bright)
    q = torch.quantile(bright.abs().flatten(1), 0.97, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(squeezed, bright.clamp(-q, q) / q)
    assert torch.equal(squeezed[0], bright[0]) and squeezed.abs().max() == 1
    for share in (0.0, 0.3, 1.0):
        for count in (1, 2, 7):
            values = torch.randn(3, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
            wanted = torch.quantile(values, share, dim=1, keepdim=True)
            torch.testing.assert_close(quantile(values, share), wanted)


def test_repairs_come_in_one_order_the_threshold_last() -> None:
    order = [kind.__name__ for kind in GUIDANCES if issubclass(kind, Repair) and kind.__module__.startswith("dgfast.")]
    assert order == ["PixelNorm", "Renorm", "Rescale", "DynamicThreshold"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"cfg_rescale": 1.5}, "cfg_rescale 1.5 must lie between 0 and 1"),
        ({"cfg_norm": -0.1}, "cfg_norm -0.1 must lie between 0 and 1"),
        ({"renorm": -1.0}, "renorm -1.0 must be at least 0"),
        ({"dynamic_threshold": 99.5}, "dynamic_threshold 99.5 must lie between 0 and 1"),
    ],
)
def test_repair_without_meaning_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        GuidanceConfig(**options)
