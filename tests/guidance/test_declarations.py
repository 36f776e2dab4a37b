"""A guidance is one class: declared once, it is in every command line, bundle, plan and exported file."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import sample
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.export import to_onnx
from dgfast.guidance import GUIDANCES, Guidance, option
from dgfast.guidance.declaration import all_options, guiding, overridden
from dgfast.guidance.options import PAIR, POINTS, Option
from dgfast.image_folder import read_images
from dgfast.networks import Networks
from dgfast.runtimes.onnx.session import OnnxEngine
from tests.support.paths import ROOT


@pytest.fixture
def brightness() -> Iterator[type[Guidance]]:
    @dataclass(frozen=True, eq=False)
    class Brightness(Guidance):
        """D' = D + w at noise levels above `above`."""

        @dataclass(frozen=True)
        class Options:
            brightness: float = option(0.0, "How much brighter; 0 turns it off.", "w", attribute="weight")
            brightness_above: float = option(0.1, "Noise level above which it acts.", "sigma")

        weight: float | Tensor
        above: float

        name = "brightness guidance"
        formula = "D + w"

        @classmethod
        def make(cls, networks: Networks, config: GuidanceConfig) -> "Brightness":
            return cls(config.brightness, config.brightness_above)  # type: ignore[attr-defined]

        def active(self, sigma_low: float, sigma_high: float) -> bool:
            return bool(self.weight != 0) and sigma_high > self.above

        def correct(
            self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
        ) -> tuple[Tensor, Tensor, None]:
            return torch.ones_like(denoised), self.weight * (sigma > self.above).to(sigma.dtype), None

    yield Brightness
    GUIDANCES.remove(Brightness)


def _draw(bundle: Bundle, out: Path, *options: str) -> np.ndarray:
    command = ["--bundle", str(bundle.folder), "--seeds", "0-3", "--device", "cpu", "--out", str(out), *options]
    done = CliRunner().invoke(sample.main, command)
    assert done.exit_code == 0, done.output
    return read_images(out)[0].astype(int)


def test_declared_guidance_is_sampled_exported_and_run_without_another_line(
    brightness: type[Guidance], small_bundle: Bundle, tmp_path: Path
) -> None:
    made = ["--brightness", "0.2", "--brightness-above", "0.5"]
    done = CliRunner().invoke(to_onnx.main, ["--bundle", str(small_bundle.folder), "--out", str(tmp_path / "f"), *made])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "f").glob("*.onnx")
    assert list(OnnxEngine(path).inputs) == ["x", "sigma", "class_labels", "brightness"]

    plain, eager = _draw(small_bundle, tmp_path / "plain"), _draw(small_bundle, tmp_path / "eager", *made)
    assert np.abs(eager - plain).mean() > 5
    engine = ["--runtime", "onnx", "--engine", str(path)]
    assert np.abs(_draw(small_bundle, tmp_path / "onnx", *made, *engine) - eager).max() <= 1
    assert np.abs(_draw(small_bundle, tmp_path / "off", *engine) - plain).max() <= 1  # the weight is an input
    other = ["--bundle", str(small_bundle.folder), "--brightness", "0.2", *engine, "--out", str(tmp_path / "other")]
    done = CliRunner().invoke(sample.main, other)
    assert done.exit_code == 2 and "exported with another brightness_above, 0.5" in done.output  # and this is inside


def test_declared_guidance_has_its_section_of_help(brightness: type[Guidance]) -> None:
    shown = CliRunner().invoke(sample.main, ["--help"], terminal_width=200).output
    assert "Brightness guidance, D + w:\n  --brightness w " in shown and "--brightness-above sigma" in shown


def test_declared_guidance_is_in_the_configuration_and_in_bundles(
    brightness: type[Guidance], small_bundle: Bundle, tmp_path: Path
) -> None:
    before = GuidanceConfig()
    config = replace(before, brightness=0.3)  # type: ignore[call-arg]  # declared above, at run time
    assert asdict(config)["brightness"] == 0.3 and config != before and "brightness=0.3" in repr(config)
    bundles.write(replace(small_bundle, folder=tmp_path, guidance=config))
    assert bundles.read(tmp_path).guidance == config
    with pytest.raises(UserError, match="brightness nan is not a finite number"):
        replace(config, brightness=float("nan"))  # type: ignore[call-arg]


def test_declared_before_the_configuration_is_in_it_too() -> None:
    code = """
from dataclasses import dataclass
from dgfast.guidance import Guidance, option
class Early(Guidance):
    @dataclass(frozen=True)
    class Options:
        early: float = option(0.0, "How early.", "w", attribute="weight")
from dgfast import GuidanceConfig
print(GuidanceConfig(early=0.5).early, GuidanceConfig().dg_weight)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0.5 0.0\n", done.stderr


def test_declared_again_it_stands_in_the_place_of_the_first() -> None:
    """As when a cell of a notebook is run anew, or a dataclass with slots made of a class: it would guide twice."""

    def declare(default: float) -> None:
        class Again(Guidance):
            @dataclass(frozen=True)
            class Options:
                again: float = option(default, "How often.", "w", attribute="weight")

    declare(0.0)
    first, count = GUIDANCES[-1], len(GUIDANCES)
    declare(0.5)
    try:
        assert GUIDANCES[-1].__qualname__ == first.__qualname__ and first not in GUIDANCES and len(GUIDANCES) == count
        assert asdict(GuidanceConfig())["again"] == 0.5
    finally:
        GUIDANCES.pop()


def test_option_that_another_guidance_has_or_that_is_none_is_refused() -> None:
    before = [*GUIDANCES]
    with pytest.raises(UserError, match=r"Another\.Options: ClassifierFreeGuidance has an option cfg_scale of its own"):

        class Another(Guidance):
            @dataclass(frozen=True)
            class Options:
                cfg_scale: float = option(0.0, "Another scale.", "w", attribute="weight")

    with pytest.raises(UserError, match=r"Plain\.Options: number is made by no `option`"):

        class Plain(Guidance):
            @dataclass(frozen=True)
            class Options:
                number: float = 0.0

    assert before == GUIDANCES and GuidanceConfig().cfg_scale == 1.0


def test_option_that_the_command_has_itself_is_refused_there() -> None:
    code = """
from dataclasses import dataclass
from dgfast.guidance import Guidance, option
class Seeding(Guidance):
    @dataclass(frozen=True)
    class Options:
        seeds: float = option(0.0, "How many.", "w", attribute="weight")
from dgfast import sample
sample.main(["--dry-run"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Error: a guidance has the option seeds, which this command has" in done.stderr


def test_every_option_is_a_field_of_the_configuration_and_turns_its_guidance_on() -> None:
    names = {one.name for one in all_options()}
    assert names <= {one.name for one in fields(GuidanceConfig)} and len(names) == 63
    assert not any(kind.on(GuidanceConfig()) or kind.on(GuidanceConfig(), second=True) for kind in GUIDANCES)
    assert [kind.name for kind in GUIDANCES if kind.on(GuidanceConfig(dg_weight_2nd=1.0), second=True)] == [
        "discriminator guidance"
    ]


def test_options_of_the_commands_are_those_declared() -> None:
    for command, exported in ((sample.main, False), (to_onnx.main, True)):
        names = [parameter.name for parameter in command.get_params(click.Context(command))]
        assert {one.name for one in all_options() if one.exported or not exported} <= set(names)
        assert len(names) == len(set(names)) and ("dg_every" in names) is not exported


def test_what_a_bundle_has_for_a_guidance_goes_with_it_when_it_is_turned_off() -> None:
    bundled = GuidanceConfig(apg_scale=3.0, apg_eta=0.5, guidance_interval=(0.1, 5.0), cfg_rescale=0.7)
    assert overridden(bundled, {"apg_eta": 0.2}) == replace(bundled, apg_eta=0.2)
    assert overridden(bundled, {"apg_scale": 1.0}) == GuidanceConfig(cfg_rescale=0.7)
    both = {"apg_scale": 1.0, "cfg_scale": 2.0}  # the interval is of both
    assert overridden(bundled, both) == GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.1, 5.0), cfg_rescale=0.7)
    idle = GuidanceConfig(cfg_channels=3)  # of the network: a bundle says how, and leaves it to the user whether
    assert overridden(idle, {"cfg_scale": 2.0}) == GuidanceConfig(cfg_channels=3, cfg_scale=2.0)


def test_first_option_of_every_guidance_turns_it_on() -> None:
    for kind in GUIDANCES:
        assert kind.on(_with(kind.options()[0].name, _other(kind.options()[0]))), kind.name


@pytest.mark.parametrize("name", [one.name for one in all_options()])
def test_option_of_a_guidance_that_is_off_is_refused_in_one_line(name: str) -> None:
    _require_refused(name)


def test_option_of_a_guidance_of_your_own_that_is_off_is_refused(brightness: type[Guidance]) -> None:
    _require_refused("brightness_above")
    with pytest.raises(UserError, match=r"^brightness_above does nothing without brightness, which turns brightness g"):
        GuidanceConfig(brightness_above=0.5)  # type: ignore[call-arg]


def _require_refused(name: str) -> None:
    """Set, typed, and typed beside the weight that turns its guidance off; the line names what turns it on."""
    one = next(one for one in all_options() if one.name == name)
    owners = [kind for kind in GUIDANCES if one in kind.options()]
    if {*guiding(_with(name, _other(one)))} & {*owners}:  # it turns its guidance on itself
        return
    first = [kind.options()[0] for kind in owners]
    off = {weight.name: weight.off for weight in first if weight.attribute and weight.default is not None}
    line = f"^{name} (does nothing without|needs) .*({'|'.join(kind.switches()[0] for kind in owners)})[^\n]*$"
    for value in {_other(one), *([] if one.attribute else [one.default])}:
        for given in ({name: value}, {**off, name: value}):
            with pytest.raises(UserError, match=line):
                overridden(GuidanceConfig(), given)
    if not one.of_network:
        with pytest.raises(UserError, match=line):
            GuidanceConfig(**{name: _other(one)})


def _with(name: str, value: object) -> Any:
    """The defaults with another value, which a `GuidanceConfig` may refuse."""
    return SimpleNamespace(**asdict(GuidanceConfig()) | {name: value})


def _other(one: Option) -> Any:
    """A value that it may have and is not its default."""
    others = [choice for choice in one.choices if choice != one.default]
    kinds = {float: 0.625, int: 2, bool: True, str: "name", PAIR: (0.125, 0.5), POINTS: ((0.25, 2.0),)}
    value = others[0] if others else kinds[one.kind]
    one.check(value)
    assert value != one.default
    return value
