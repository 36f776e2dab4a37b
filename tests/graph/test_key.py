"""The name of all that a trace depends on: whatever changes it has another name, or none."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import nets, ops
from dgfast.graph import Function
from dgfast.graph import key as graph_key
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    WeightSchedule,
    guided_denoiser,
    guided_posterior,
)
from dgfast.guidance import discriminator as discriminator_module
from dgfast.guidance.reuse import gradient_keeping_denoiser
from dgfast.job import PureFunction
from dgfast.nets import blocks
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.noise_levels import vp_time
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
    discriminator = DiscriminatorGuidance(masters["discriminator"], **time)
    others = [
        Autoguidance(masters["net"], 2.0), ClassifierFreeGuidance(net, 2.0),
        ClassifierGuidance(classifier, 2.0, **time), LowDensityGuidance(classifier, 0.1, **time),
        PredictedCleanGuidance(classifier, 0.1, **time),
    ]  # fmt: skip
    functions: list[Function] = [
        PureFunction(  # as a sampler has it
            "denoiser", guided_denoiser(net, [*others, discriminator]), ("x", "sigma", "class_labels"), (),
            (*others, discriminator),
        ),
        guided_posterior(net, [*others, discriminator]), gradient_keeping_denoiser(net, others, discriminator),
    ]  # fmt: skip
    keys = {key(function) for function in functions}
    assert len(keys) == 3 and None not in keys


CODE = """
import torch
from dgfast import nets
from dgfast.guidance import guided_denoiser, ClassifierFreeGuidance
from dgfast.graph import cache as graph_cache, key as graph_key
torch.manual_seed(0)
net = nets.build("EDMPrecond", model_type="SongUNet", img_resolution=8, img_channels=1, label_dim=3, model_channels=16,
                 channel_mult=[1], num_blocks=1, attn_resolutions=[8]).eval().requires_grad_(False)
function = guided_denoiser(net, [ClassifierFreeGuidance(net, 2.0)])
x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
print(graph_cache._named(function, (x, x.new_ones(2), torch.zeros(2, 3)))[0].stem)
names = graph_key.Key()
names.add(frozenset("abcdefgh"))  # in an order that the seed decides
print(names.digest())
"""


def test_graph_cache_keys_are_the_same_in_every_process() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (run.communicate()[0].split() for run in runs)
    assert first == second and len(first) == 2


# Misses ---------------------------------------------------------------------------------------------------------------
def _weight(chosen: Nets) -> None:
    next(chosen["net"].parameters()).view(-1)[0] += 1e-6


def _config(chosen: Nets) -> None:
    chosen["net"].sigma_data += 0.125


def _mode(chosen: Nets) -> None:
    chosen["net"].train()


def _layout(chosen: Nets) -> None:
    chosen["discriminator"].to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [_weight, _config, _mode, _layout])
def test_graph_cache_misses_another_network(tiny: Nets, change: Callable[[Nets], None]) -> None:
    before = key(guided(tiny))
    assert before == key(guided(copy.deepcopy(tiny))) is not None
    change(tiny)
    assert before != key(guided(tiny)) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 2.0000000000000004}, {"weight": 2}, {"window": (0.1, 0.8)}, {"boost": 2.0},
        {"schedule": WeightSchedule(((0.1, 1.0),))}, {"published_window": True},
    ],
    ids=str,
)  # fmt: skip
def test_graph_cache_misses_another_guidance(tiny: Nets, changes: dict[str, Any]) -> None:
    assert key(guided(tiny)) != key(guided(tiny, **changes)) is not None


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


def _settings() -> Iterator[tuple[str, Callable[..., object], object, object]]:
    """Name, what sets it, another value, the value here."""
    yield "deterministic", torch.use_deterministic_algorithms, False, True
    yield "dtype", torch.set_default_dtype, torch.float64, torch.float32
    yield "matmul", torch.set_float32_matmul_precision, "medium", "highest"
    yield "attention", torch.backends.cuda.enable_flash_sdp, False, True
    yield "onednn", partial(setattr, torch.backends.mkldnn, "enabled"), False, True


@pytest.mark.parametrize(("set_to", "other", "here"), [pytest.param(*s[1:], id=s[0]) for s in _settings()])
def test_graph_cache_misses_other_settings(tiny: Nets, set_to: Any, other: object, here: object) -> None:
    set_to(here)
    before = key(guided(tiny))
    try:
        set_to(other)
        assert before != key(guided(tiny)) is not None
    finally:
        set_to(here)
    assert before == key(guided(tiny))


def test_graph_cache_misses_other_code(tiny: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(guided(tiny))]
    with monkeypatch.context() as patch:
        patch.setattr(graph_key, "_sources", lambda: "another")
        keys += [key(guided(tiny))]
    with monkeypatch.context() as patch:  # a number that the code names
        patch.setattr(discriminator_module, "LOGIT_LIMIT", 1.0)
        keys += [key(guided(tiny))]
    with monkeypatch.context() as patch:  # a function deep inside, as it stands in memory
        code = blocks._deinterleaved.__code__
        others = tuple(value + 1 if type(value) is int else value for value in code.co_consts)
        patch.setattr(blocks._deinterleaved, "__code__", code.replace(co_consts=others))
        keys += [key(guided(tiny))]
    with ops.kernels("triton") if _has_triton() else ExitStack():
        keys += [key(guided(tiny))] if _has_triton() else []
    assert len(set(keys)) == len(keys) and None not in keys and key(guided(tiny)) == keys[0]


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


# What has no name -----------------------------------------------------------------------------------------------------
class Mine(nn.Module):
    """A user's own network, whose code no key can know."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x / 2


def _mine(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    return guided(chosen, net=Mine())


def _function(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    return guided(chosen, net=lambda x, sigma, labels: x / 2)


def _inside(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    chosen["net"].model.enc["8x8_conv"] = Mine()
    return guided(chosen)


def _hook(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    chosen["net"].register_forward_hook(torch.add)
    return guided(chosen)


def _forward(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    chosen["net"].forward = lambda x, *_: x / 2
    return guided(chosen)


def _patched_class(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    patch.setattr(blocks.Conv2d, "forward", lambda self, x: x)
    return guided(chosen)


def _patched_function(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    patch.setattr(ops, "group_norm_silu_reference", lambda x, *_: x)
    return guided(chosen)


def _patched_torch(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    patch.setattr(F, "silu", lambda x: x)
    return guided(chosen)


def _patched_layer(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    patch.setattr(nn.Conv2d, "forward", lambda self, x: x)
    return guided(chosen)


def _patched_object(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    patch.setattr(F, "silu", partial(torch.mul, 2))
    return guided(chosen)


def _subclass(chosen: Nets, patch: pytest.MonkeyPatch) -> Function:
    class Louder(DiscriminatorGuidance):
        pass

    return guided_denoiser(chosen["net"], [Louder(chosen["discriminator"])])


NAMELESS = [
    _mine, _function, _inside, _hook, _forward, _patched_class, _patched_function, _patched_torch, _patched_layer,
    _patched_object, _subclass,
]  # fmt: skip


@pytest.mark.parametrize("make", NAMELESS)
def test_graph_cache_keeps_nothing_of_a_user(tiny: Nets, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    with monkeypatch.context() as patch:
        assert key(make(tiny, patch)) is None


def test_graph_cache_keeps_nothing_of_a_function_that_holds_its_argument(tiny: Nets) -> None:
    x, sigma, labels = example()
    tiny["net"].last = x
    assert key(guided(tiny), (x, sigma, labels)) is None
    assert key(guided(tiny), (x.clone(), sigma, labels)) is not None


def test_graph_cache_keeps_nothing_under_a_mode() -> None:
    with torch.device("cpu"), pytest.raises(graph_key.NamelessError, match="modes"):
        graph_key.environment(torch.device("cpu"))
