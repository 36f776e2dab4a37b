"""Low-density guidance lowered and compiled, against eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.graph.agreement import relative_error
from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.guidance import (
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    guided_denoiser,
)
from dgfast.guidance.gradient import NORMALIZATIONS
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.runtimes.cpu import build as cpu
from tests.support.guidance import (
    batch,
)

NetFactory = Callable[..., Any]


def both_terms(classifier: Any, normalize: str, read_at_t: bool = True) -> list[Guidance]:
    return [
        LowDensityGuidance(classifier, 3.0, normalize),
        PredictedCleanGuidance(classifier, 5.0, normalize, 2, read_at_t),
    ]


def labels_of_three(count: int, first: int) -> Tensor:
    return F.one_hot((torch.arange(count) + first) % 3, 3).float()


@torch.no_grad()
@pytest.mark.parametrize(("normalize", "read_at_t"), [*((how, True) for how in NORMALIZATIONS), ("none", False)])
def test_low_density_lowered_graph_equals_eager_on_fresh_inputs(
    tiny_net: NetFactory, tiny_classifier: NoisyClassifier, normalize: str, read_at_t: bool
) -> None:
    net = tiny_net(label_dim=3, channel_mult=[1])
    function = guided_denoiser(net, both_terms(tiny_classifier, normalize, read_at_t))
    example = (*batch(seed=6, size=4, pixels=8), labels_of_three(4, 0))
    graph = lower(trace(function, example), example, channels_last=True)
    x, sigma = batch(seed=7, size=4, pixels=8)
    inputs = x, sigma.flip(0), labels_of_three(4, 1)
    reference, plain = function(*inputs)[0], net(*inputs)
    assert relative_error(graph(*inputs)[0], reference) < 2e-5
    assert relative_error(plain.double(), reference) > 1e-3


def test_low_density_compiled_equals_eager(
    tiny_net: NetFactory, tiny_classifier: NoisyClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = guided_denoiser(tiny_net(label_dim=3, channel_mult=[1]), both_terms(tiny_classifier, "sample_l2"))
    run = cpu.build(function, (*batch(seed=8, size=2, pixels=8), labels_of_three(2, 0)))
    x, sigma = batch(seed=9, size=2, pixels=8)
    inputs = x, sigma.flip(0), labels_of_three(2, 1)
    with torch.no_grad():
        reference = function(*inputs)[0]
    assert relative_error(run(*inputs)[0], reference) < 2e-5
