"""Compiled code returns what eager does, keeps nothing, and serves other weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.nets.discriminator import Discriminator
from dgfast.runtimes import compiled, onednn, regions
from dgfast.runtimes.graph import Function
from tests.support.runtimes import FLOAT32_TOL, LEVELS, WINDOW, NetFactory, at_levels, largest_error


@pytest.fixture(scope="module")
def compilations() -> Iterator[list[int]]:
    """Grows by one with every region that inductor compiles. Of those, only the larger ones: each costs seconds."""
    counted: list[int] = []
    compile_region = torch._inductor.compile

    def counting(*arguments: Any, **keywords: Any) -> Any:
        counted.append(len(counted))
        return compile_region(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", counting)
        patch.setattr(regions, "_WORTHWHILE", 0.1)
        patch.setattr(compiled, "_COMPILED_REGIONS", {})  # what other tests compiled is not there
        yield counted


@dataclass
class Built:
    """A compiled guided denoiser of 2 images, and how many regions were compiled for it."""

    function: Function
    run: Function
    compilations: int


@pytest.fixture(scope="module")
def built(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator], compilations: list[int]
) -> Callable[[float, str], Built]:
    def build(weight: float, prefix: str) -> Built:
        guidance = DiscriminatorGuidance(small_discriminator(0), weight, WINDOW)
        function = guided_denoiser(tiny_net(prefix=prefix, channel_mult=[1]), [guidance])
        before = len(compilations)
        run = compiled.build(function, (*at_levels(2, seed=0, first=2), None))
        return Built(function, run, len(compilations) - before)

    return build


@pytest.fixture(scope="module")
def first_build(built: Callable[[float, str], Built]) -> Built:
    return built(100.0, "tiny/")


def test_runtimes_compiled_equals_eager(first_build: Built) -> None:
    assert first_build.compilations > 0
    for first in range(0, len(LEVELS), 2):
        x, sigma = at_levels(2, seed=11 + first, first=first)
        with torch.no_grad():
            reference, ratio = first_build.function(x, sigma, None)
        denoised, log_ratio = first_build.run(x, sigma, None)
        assert not denoised.requires_grad and not log_ratio.requires_grad
        assert largest_error(denoised, reference) < FLOAT32_TOL
        torch.testing.assert_close(log_ratio, ratio, rtol=FLOAT32_TOL, atol=FLOAT32_TOL)


def test_runtimes_compiled_results_are_not_overwritten_by_the_next_call(first_build: Built) -> None:
    x, sigma = at_levels(2, seed=21, first=2)
    denoised, log_ratio = first_build.run(x, sigma, None)
    kept = denoised.clone(), log_ratio.clone()
    given_ = x.clone(), sigma.clone()
    first_build.run(*at_levels(2, seed=22, first=3), None)
    assert torch.equal(denoised, kept[0]) and torch.equal(log_ratio, kept[1])
    assert torch.equal(x, given_[0]) and torch.equal(sigma, given_[1])
    assert torch.equal(first_build.run(x, sigma, None)[0], kept[0])


def test_runtimes_compiled_regions_are_shared_between_functions(
    first_build: Built, built: Callable[[float, str], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights of the net and of the guidance, and no oneDNN: the regions are the same ones."""
    monkeypatch.setattr(onednn, "available", lambda: False)
    second = built(50.0, "other/")
    assert second.compilations == 0 < first_build.compilations
    x, sigma = at_levels(2, seed=31, first=2)
    with torch.no_grad():
        reference, _ = second.function(x, sigma, None)
        other, _ = first_build.function(x, sigma, None)
    assert largest_error(second.run(x, sigma, None)[0], reference) < FLOAT32_TOL < largest_error(other, reference)


def test_runtimes_compiling_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(UserError) as error:
        compiled.build(lambda x: (x * 2,), [None, torch.ones(2)])
    message = str(error.value.message)
    assert "needs a C++ compiler" in message and "apt install g++" in message and "--compile=try" in message
    assert "\n" not in message
