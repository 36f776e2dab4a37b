"""Compiled code returns what eager does, keeps nothing, and serves other weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.nets.discriminator import Discriminator
from dgfast.runtimes.cpu import build as cpu
from dgfast.runtimes.cpu import onednn
from dgfast.runtimes.cpu.native import library
from tests.support.runtimes import FLOAT32_TOL, LEVELS, WINDOW, NetFactory, at_levels, largest_error

Build = Callable[[float, str], tuple[Function, Function]]


@pytest.fixture(scope="module")
def build(tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator]) -> Build:
    """(guidance weight, which weights) -> a guided denoiser of 2 images, and it compiled."""

    def build(weight: float, prefix: str) -> tuple[Function, Function]:
        guidance = DiscriminatorGuidance(small_discriminator(0), weight, WINDOW)
        function = guided_denoiser(tiny_net(prefix=prefix), [guidance])
        return function, cpu.build(function, (*at_levels(2, seed=0, first=2), None))

    return build


@pytest.fixture(scope="module")
def first_build(build: Build) -> tuple[Function, Function]:
    return build(100.0, "tiny/")


def test_runtimes_compiled_equals_eager(first_build: tuple[Function, Function]) -> None:
    function, run = first_build
    for first in range(0, len(LEVELS), 2):
        x, sigma = at_levels(2, seed=11 + first, first=first)
        with torch.no_grad():
            reference, ratio = function(x, sigma, None)
        denoised, log_ratio = run(x, sigma, None)
        assert not denoised.requires_grad and not log_ratio.requires_grad
        assert largest_error(denoised, reference) < FLOAT32_TOL
        torch.testing.assert_close(log_ratio, ratio, rtol=FLOAT32_TOL, atol=FLOAT32_TOL)


def test_runtimes_compiled_results_are_not_overwritten_by_the_next_call(
    first_build: tuple[Function, Function],
) -> None:
    _, run = first_build
    x, sigma = at_levels(2, seed=21, first=2)
    denoised, log_ratio = run(x, sigma, None)
    kept = denoised.clone(), log_ratio.clone()
    given_ = x.clone(), sigma.clone()
    run(*at_levels(2, seed=22, first=3), None)
    assert torch.equal(denoised, kept[0]) and torch.equal(log_ratio, kept[1])
    assert torch.equal(x, given_[0]) and torch.equal(sigma, given_[1])
    assert torch.equal(run(x, sigma, None)[0], kept[0])


def test_runtimes_compiled_regions_are_shared_between_functions(
    first_build: tuple[Function, Function], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights of the net and of the guidance, and no oneDNN: the regions are the same ones."""
    monkeypatch.setattr(onednn, "available", lambda: False)
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    function, run = build(50.0, "other/")
    x, sigma = at_levels(2, seed=31, first=2)
    with torch.no_grad():
        reference, _ = function(x, sigma, None)
        other, _ = first_build[0](x, sigma, None)
    assert largest_error(run(x, sigma, None)[0], reference) < FLOAT32_TOL < largest_error(other, reference)


def test_runtimes_compiled_code_serves_every_batch_size(
    first_build: tuple[Function, Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, _ = first_build
    cpu.build(function, (*at_levels(6, seed=0, first=2), None))  # enough pixels for Winograd, as 5 samples have
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    run = cpu.build(function, (*at_levels(5, seed=0, first=2), None))
    x, sigma = at_levels(5, seed=41, first=1)
    with torch.no_grad():
        reference, _ = function(x, sigma, None)
    assert largest_error(run(x, sigma, None)[0], reference) < FLOAT32_TOL


def test_runtimes_compiling_without_a_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError) as error:
        cpu.build(lambda x: (x * 2,), [None, torch.ones(2)])
    message = str(error.value.message)
    assert "needs a C++ compiler" in message and "apt install g++" in message and "--compile=try" in message
    assert "\n" not in message
