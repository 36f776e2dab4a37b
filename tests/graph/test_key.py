"""The name of all that a trace depends on: whatever changes it has another name, or none."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dgfast import Networks, nets, pure_function
from dgfast.config import SamplingConfig
from dgfast.denoiser import VEPrecond
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    WeightSchedule,
)
from dgfast.job import Job
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.nets.generator import Generator
from dgfast.vp import TIME_SCHEDULES, vp_time
from tests.support.graphs import Nets, example, guided, key
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("folder")

SCORES: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (kind, {"model_type": "SongUNet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1})
    for kind in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
} | {
    "DhariwalUNet": ("EDMPrecond", {"model_type": "DhariwalUNet", "model_channels": 16, "num_blocks": 1}),
    "ADM": (
        "DDPMPrecond",
        {
            "model_type": "create_model", "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
            "class_cond": True, "attention_resolutions": "8",
        },
    ),
    "DiT": ("DDPMPrecond", {"model_type": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_graph_cache_knows_every_network_and_guidance_by_name(masters: Nets, name: str) -> None:
    """So that none of them is traced in every run."""
    kind, keywords = SCORES[name]
    net: Any = nets.build(kind, img_resolution=8, img_channels=1, label_dim=3, **keywords).eval()
    classifier = NoisyClassifier(masters["discriminator"].trunk)
    time: dict[str, Any] = {"time": getattr(net, "time", vp_time)}
    guidances = [
        Autoguidance(masters["net"], 2.0), ClassifierFreeGuidance(net, 2.0),
        ClassifierGuidance(classifier, 2.0, **time), LowDensityGuidance(classifier, 0.1, **time),
        PredictedCleanGuidance(classifier, 0.1, **time), DiscriminatorGuidance(masters["discriminator"], **time),
    ]  # fmt: skip
    jobs = [Job(Networks(net), SamplingConfig(num_steps=4, clip_denoised=clip)) for clip in (False, True)]
    functions = [
        made.called(some, keep) for made in jobs for keep in (False, True) for some in (guidances, guidances[1:])
    ]
    posteriors = [made.guided("posterior", guidances) for made in jobs]
    keys = {key(function) for function in (*functions, *posteriors)}
    assert len(keys) == 10 and None not in keys


def test_graph_cache_knows_the_generator_by_name() -> None:
    generators = [Generator(8, 1, latent_dim=4, style_dim=8, channels=(8, 8)).eval() for _ in range(2)]
    keys = {key(pure_function.generator(generator), (torch.zeros(2, 4), None)) for generator in generators}
    assert len(keys) == 2 and None not in keys


CODE = """
import torch
from dgfast import Networks, nets
from dgfast.graph import cache
from dgfast.guidance import ClassifierFreeGuidance
from dgfast.job import Job
from dgfast.pure_function import generator
calls, trace = [], cache.trace
cache.trace = lambda *arguments: calls.append(1) or trace(*arguments)
torch.manual_seed(0)
net = nets.build("EDMPrecond", model_type="SongUNet", img_resolution=8, img_channels=1, label_dim=3, model_channels=16,
                 channel_mult=[1], num_blocks=1, attn_resolutions=[8]).eval().requires_grad_(False)
x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
cache.lowered(Job(Networks(net)).called((ClassifierFreeGuidance(net, 2.0),)), (x, x.new_ones(2), torch.zeros(2, 3)))
net = nets.build("Generator", img_resolution=8, img_channels=1, label_dim=0, latent_dim=6, channels=[16, 8])
net.words = frozenset("abcdefgh")  # in an order that the seed decides
cache.lowered(generator(net), (torch.zeros(2, 6), None))
print(len(calls))
"""


def test_graph_cache_hits_in_every_process(folder: Path) -> None:
    for seed, traced in (("1", 2), ("2", 0)):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout == f"{traced}\n", done.stderr
        assert len([*folder.iterdir()]) == 2


def test_graph_cache_does_not_tell_equal_texts_apart(tiny: Nets) -> None:
    """Which of them are one object is another thing in every process."""
    text = "same"
    keys = set()
    for tiny["net"].texts in ([text, text], [text, "".join([*text])]):
        keys.add(key(guided(tiny)))
    assert len(keys) == 1 and None not in keys


# Misses ---------------------------------------------------------------------------------------------------------------
NUMBERS = torch.zeros(1), torch.ones(1)
CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "weight": lambda net, judge: next(net.parameters()).view(-1)[0].add_(1e-6),
    "buffer": lambda net, judge: net.register_buffer("one", torch.ones(1)),
    "type of zeros": lambda net, judge: net.register_buffer("one", torch.zeros(1)),
    "of other zeros": lambda net, judge: net.register_buffer("one", torch.zeros(1, dtype=torch.int32)),
    "first once more": lambda net, judge: setattr(net, "numbers", [NUMBERS[0], NUMBERS[1], NUMBERS[0]]),
    "second once more": lambda net, judge: setattr(net, "numbers", [NUMBERS[0], NUMBERS[1], NUMBERS[1]]),
    "number": lambda net, judge: setattr(net, "sigma_data", net.sigma_data + 0.125),
    "mode": lambda net, judge: net.train(),
    "mode inside": lambda net, judge: [*net.modules()][-1].train(),
    "layout": lambda net, judge: judge.to(memory_format=torch.channels_last),
    "type": lambda net, judge: net.double(),
    "gradient": lambda net, judge: net.requires_grad_(True),
    "class": lambda net, judge: setattr(net, "__class__", VEPrecond),
    "one layer twice": lambda net, judge: setattr(net.model, "map_layer1", net.model.map_layer0),
    "equal layers": lambda net, judge: setattr(net.model, "map_layer1", copy.deepcopy(net.model.map_layer0)),
    "hook of torch's": lambda net, judge: net.register_forward_hook(torch.add),
    "method of torch's": lambda net, judge: setattr(net, "forward", MethodType(nn.Identity.forward, net)),
    "another method": lambda net, judge: setattr(net, "forward", MethodType(nn.Flatten.forward, net)),
}  # fmt: skip


def test_graph_cache_misses_another_network(masters: Nets) -> None:
    keys = [key(guided(masters))]
    assert keys[0] == key(guided(copy.deepcopy(masters)))
    for change in CHANGES.values():
        changed = copy.deepcopy(masters)
        change(changed["net"], changed["discriminator"])
        keys.append(key(guided(changed)))
    assert len(set(keys)) == len(keys) == len(CHANGES) + 1 and None not in keys


def test_graph_cache_misses_another_guidance(tiny: Nets) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"weight": 2.0000000000000004}, {"weight": 2}, {"window": (0.1, 0.8)}, {"boost": 2.0}, {"boost": True},
        {"schedule": WeightSchedule(((0.1, 1.0),))}, {"published_window": True}, {"time": TIME_SCHEDULES["cosine"]},
        {"weight": torch.tensor(2.0)}, {"weight": torch.tensor(3.0)}, {"discriminator": tiny["net"]},
    ]  # fmt: skip
    keys = {key(guided(tiny, **change)) for change in changes}
    assert len(keys) == len(changes) and None not in keys


def test_graph_cache_misses_other_arguments(tiny: Nets) -> None:
    x, sigma, labels = example()
    transposed = x.transpose(2, 3)
    twice = torch.ones(2, 1, 8, 8, dtype=torch.float64)
    others = [
        example(), example(3), example(dtype=torch.float32), (x, sigma, None), (x, sigma.float(), labels),
        (transposed, sigma, labels), (twice, twice, labels), (twice, twice.clone(), labels), (twice, sigma, twice),
    ]  # fmt: skip
    keys = {key(guided(tiny), other) for other in others}
    assert len(keys) == len(others) and None not in keys


# What has no name -----------------------------------------------------------------------------------------------------
class Mine(nn.Module):
    """A user's own network, whose code no key can know."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x / 2


def forward(self: Any, x: Tensor, *_: Any) -> Tensor:
    return x / 2


def time(sigma: Tensor) -> Tensor:
    return sigma / 100


@lru_cache
def kept_time(sigma: Tensor) -> Tensor:
    return sigma / 100


@dataclass(frozen=True, eq=False)
class Louder(DiscriminatorGuidance):
    pass


class Halved(Tensor):
    pass


NAMELESS: dict[str, Callable[[Any, Any], object]] = {
    "network": lambda net, options: options.update(net=Mine()),
    "function for a network": lambda net, options: options.update(net=lambda x, *_: x / 2),
    "layer": lambda net, options: setattr(net.model, "map_layer0", Mine()),
    "hook": lambda net, options: net.register_forward_hook(forward),
    "hook that says it is torch's": lambda net, options: net.register_forward_hook(wraps(torch.relu)(forward)),
    "lambda": lambda net, options: setattr(net, "forward", lambda x, *_: x / 2),
    "method": lambda net, options: setattr(net, "forward", MethodType(forward, net)),
    "class": lambda net, options: setattr(net, "__class__", type("EDMPrecond", (type(net),), {})),
    "parametrized": lambda net, options: parametrize.register_parametrization(
        net.model.map_layer0, "weight", nn.Identity()
    ),
    "compiled": lambda net, options: net.compile(backend="eager"),
    "of another type": lambda net, options: net.register_buffer("other", torch.ones(1).as_subclass(Halved)),
    "sparse": lambda net, options: net.register_buffer("other", torch.ones(1).to_sparse()),
    "nowhere": lambda net, options: net.register_buffer("other", torch.ones(1, device="meta")),
    "guidance": lambda net, options: options.update(kind=Louder),
    "function": lambda net, options: options.update(time=time),
    "function inside": lambda net, options: options.update(time=partial(time)),
    "function kept": lambda net, options: options.update(time=kept_time),
    "function of torch's around it": lambda net, options: options.update(time=torch.no_grad()(time)),
    "closure": lambda net, options: options.update(time=lambda sigma: vp_time(sigma)),
}  # fmt: skip


@pytest.mark.parametrize("change", NAMELESS.values(), ids=NAMELESS)
def test_graph_cache_keeps_nothing_of_a_user(tiny: Nets, change: Callable[[Any, Any], object]) -> None:
    options: dict[str, Any] = {}
    assert key(guided(tiny)) is not None
    change(tiny["net"], options)
    assert key(guided(tiny, **options)) is None


def test_graph_cache_keeps_nothing_of_a_function_that_holds_its_argument(tiny: Nets) -> None:
    x, sigma, labels = example()
    tiny["net"].last = x
    assert key(guided(tiny), (x, sigma, labels)) is None
    assert key(guided(tiny), (x.clone(), sigma, labels)) is not None
