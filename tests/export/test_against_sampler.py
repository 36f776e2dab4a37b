"""What is exported draws the sampler's own images: a function that agrees with itself alone may be another function."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.engines import require_fit, runtime_of
from dgfast.errors import UserError
from dgfast.export.joint_graph import joint
from dgfast.export.request import Request
from dgfast.export.subject import Joint
from dgfast.nets.discriminator import Discriminator
from dgfast.networks import Networks, one_hot
from dgfast.sampler import Sampler

CPU = torch.device("cpu")
CLASSES = 3
WEIGHT = GuidanceConfig(dg_weight=2.0, dg_weight_2nd=0.5)
FREE = GuidanceConfig(cfg_scale=2.0, cfg_scale_low=3.0, cfg_branch=1.0)


@dataclass
class File:
    """An exported function as an engine shows it, without the file between: float64, so that rounding hides nothing."""

    subject: Joint
    metadata: Mapping[str, str]
    path: Path = Path("file.onnx")
    batch: int | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        sizes = self.subject.sizes()
        return {name: (("batch", *sizes[name]) if name in sizes else (1,), "float") for name in self.subject.inputs}

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert arguments.keys() == set(self.subject.inputs)
        with torch.no_grad():
            results = self.subject.function(*(arguments[name] for name in self.subject.inputs))
        return dict(zip(self.subject.outputs, results, strict=True))


@pytest.fixture(scope="module")
def networks(tiny_net: Callable[..., Any], small_discriminator: Callable[[int], Discriminator]) -> Networks:
    """All that a guidance may need; the discriminator's logits lie on both sides of 0, as boosting needs."""
    discriminator = small_discriminator(CLASSES)
    return Networks(
        tiny_net(label_dim=CLASSES, channel_mult=[1]),
        lambda u, t, y: 3 * discriminator(u, t, y) + u.mean(dim=(1, 2, 3)),
        lambda u, t: 2 * u.flatten(1)[:, :CLASSES] * (1 + t).view(-1, 1),
        tiny_net(label_dim=CLASSES, channel_mult=[1], prefix="worse/"),
    )


def start() -> tuple[Tensor, Tensor]:
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return latents, one_hot([2, 0, 1], CLASSES, 3, CPU)


def apart(mine: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((mine - reference).abs().max() / reference.abs().max())


# A whole step ---------------------------------------------------------------------------------------------------------
def steps_by_hand(subject: Joint, weights: Mapping[str, float]) -> Tensor:
    """The images that the step's file gives, called as `examples/onnx_only.py` calls it."""
    latents, labels = start()
    x = latents.double() * subject.sigmas[0]
    for sigma, sigma_next in zip(subject.sigmas[:-1], subject.sigmas[1:], strict=True):
        levels = {"sigma": sigma, "sigma_next": sigma_next}
        values = {"x": x, "class_labels": labels, **{k: torch.full((3,), v).double() for k, v in levels.items()}}
        values |= {name: torch.tensor([weight]) for name, weight in weights.items()}
        with torch.no_grad():
            (x,) = subject.function(*(values[name] for name in subject.inputs))
    return x


@pytest.mark.parametrize(
    ("sampling", "guidance"),
    [
        (SamplingConfig(num_steps=4), WEIGHT),
        (SamplingConfig(num_steps=4), replace(WEIGHT, dg_weight=0.0)),
        (SamplingConfig(num_steps=4), replace(WEIGHT, dg_weight_2nd=0.0)),
        (SamplingConfig(num_steps=4, alpha=0.6, clip_denoised=True), replace(WEIGHT, dg_window=(0.2, 0.8))),
        (SamplingConfig(num_steps=4, solver="euler"), WEIGHT),
        (SamplingConfig(num_steps=4), replace(FREE, classifier_scale=1.5, autoguidance=1.4)),
    ],
    ids=["both", "second alone", "first alone", "midway, clipped, window", "euler", "other guidances"],
)
def test_exported_step_draws_the_samplers_images(
    networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig
) -> None:
    latents, labels = start()
    wanted = Sampler(networks, sampling, guidance).integrate(latents, labels)
    subject = joint(networks, sampling, guidance, "step")
    assert apart(steps_by_hand(subject, subject.weights), wanted) < 1e-5
    off = dict.fromkeys(("dg_weight", "dg_weight_2nd", "classifier_scale"), 0.0)
    for name, weight in subject.weights.items():  # each weight is felt: in another's place it would show
        changed = subject.weights | {name: off.get(name, 1.0)}
        assert changed[name] == weight or apart(steps_by_hand(subject, changed), wanted) > 1e-4, name


def test_exported_step_takes_the_weight_of_each_point_for_that_point(networks: Networks) -> None:
    """One file serves other weights too, and the two discriminator weights are not each other's."""
    latents, labels = start()
    sampling = SamplingConfig(num_steps=4)
    subject = joint(networks, sampling, WEIGHT, "step")
    swapped = GuidanceConfig(dg_weight=WEIGHT.dg_weight_2nd, dg_weight_2nd=WEIGHT.dg_weight)
    wanted = Sampler(networks, sampling, swapped).integrate(latents, labels)
    assert apart(steps_by_hand(subject, {"dg_weight": 0.5, "dg_weight_2nd": 2.0}), wanted) < 1e-5
    assert apart(steps_by_hand(subject, {"dg_weight": 2.0, "dg_weight_2nd": 0.5}), wanted) > 1e-3


# The function that a sampler calls ------------------------------------------------------------------------------------
def file_of(networks: Networks, sampling: SamplingConfig, guidance: GuidanceConfig, bundle: Bundle) -> File:
    subject = joint(networks, sampling, guidance)
    return File(subject, Request(bundle, None, sampling, guidance).describe(subject))


@pytest.mark.parametrize(
    ("sampling", "made", "asked"),
    [
        (SamplingConfig(num_steps=4), WEIGHT, WEIGHT),
        (SamplingConfig(num_steps=4), WEIGHT, GuidanceConfig(dg_weight_2nd=1.0)),
        (SamplingConfig(num_steps=4), WEIGHT, GuidanceConfig()),
        (SamplingConfig(num_steps=4), replace(WEIGHT, boosting=True), replace(WEIGHT, boosting=True)),
        (SamplingConfig(num_steps=4), replace(WEIGHT, boosting=True), WEIGHT),
        (SamplingConfig(num_steps=4), FREE, FREE),
        (SamplingConfig(num_steps=4), FREE, replace(FREE, cfg_scale=1.0, cfg_scale_low=0.5)),
        (SamplingConfig(num_steps=4), FREE, GuidanceConfig()),
        (SamplingConfig(num_steps=4, solver="dpmpp-2m"), replace(WEIGHT, autoguidance=1.7, classifier_scale=1.0), None),
        (SamplingConfig(num_steps=4, solver="ddpm", clip_denoised=True), replace(WEIGHT, cfg_scale=1.5), None),
        (SamplingConfig(num_steps=4, solver="ddim", eta=0.5), GuidanceConfig(diversity=1.0, fidelity=2.0), None),
    ],
)
def test_exported_function_draws_the_samplers_images(
    networks: Networks,
    small_bundle: Bundle,
    sampling: SamplingConfig,
    made: GuidanceConfig,
    asked: GuidanceConfig | None,
) -> None:
    asked = made if asked is None else asked
    file = file_of(networks, sampling, made, small_bundle)
    require_fit(file, small_bundle, sampling, asked)
    latents, labels = start()
    noises = torch.randn(4, *latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    images = [
        Sampler(networks, sampling, asked, runtime=runtime).integrate(latents, labels, iter(noises).__next__)
        for runtime in ("eager", runtime_of(file))
    ]
    assert apart(images[1], images[0]) < 1e-5


def test_exported_function_calls_a_sample_without_class_one_of_none(networks: Networks, small_bundle: Bundle) -> None:
    file = file_of(networks, SamplingConfig(num_steps=4), GuidanceConfig(), small_bundle)
    latents, _ = start()
    images = [
        Sampler(networks, SamplingConfig(num_steps=4), runtime=runtime).integrate(latents)
        for runtime in ("eager", runtime_of(file))
    ]
    assert apart(images[1], images[0]) < 1e-5


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (FREE, GuidanceConfig(cfg_scale=2.0), "another cfg_branch, 1.0"),  # it would leave low noise unguided
        (FREE, replace(FREE, cfg_branch=2.0), "another cfg_branch, 1.0"),
        (GuidanceConfig(cfg_scale=2.0), FREE, "another cfg_branch, 0.0"),
        (FREE, replace(FREE, guidance_interval=(0.5, 9.0)), "another guidance_interval"),
        (FREE, replace(FREE, cfg_channels=1), "another cfg_channels"),
    ],
)
def test_exported_function_refuses_what_it_would_guide_otherwise(
    networks: Networks, small_bundle: Bundle, made: GuidanceConfig, asked: GuidanceConfig, message: str
) -> None:
    sampling = SamplingConfig(num_steps=4)
    file = file_of(networks, sampling, made, small_bundle)
    assert json.loads(file.metadata["guidance"])["cfg_scale"] == 2.0
    with pytest.raises(UserError, match=message):
        require_fit(file, small_bundle, sampling, asked)
