"""A guided denoiser lowered to operations of inference computes what it did, with and without regions."""

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dgfast.graph.lower import lower
from dgfast.graph.trace import trace
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.nets.discriminator import Discriminator
from dgfast.runtimes.cpu import onednn
from dgfast.runtimes.cpu.fusion import regions
from tests.support.runtimes import (
    CASES,
    FLOAT32_TOL,
    WINDOW,
    Case,
    Lowered,
    NetFactory,
    at_levels,
    aten,
    fresh_inputs,
    largest_error,
    one_hot,
    weights_of,
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def lowered(
    request: pytest.FixtureRequest, tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator]
) -> Lowered:
    case: Case = request.param
    net = tiny_net(label_dim=case.classes, model_type=case.model_type)
    discriminator = small_discriminator(case.classes)
    networks: list[nn.Module] = [net, discriminator]
    state = weights_of(networks)
    # At this weight the discriminator's gradient makes most of the result where it acts at all.
    function = guided_denoiser(net, [DiscriminatorGuidance(discriminator, 100.0, WINDOW)])
    example = (*at_levels(case.batch, seed=0, first=2), one_hot(case.batch, case.classes))
    graph = lower(trace(function, example), example, channels_last=case.channels_last)
    return Lowered(case, function, graph, networks, state)


@torch.no_grad()
def test_runtimes_lowered_graph_equals_eager_on_fresh_inputs(lowered: Lowered) -> None:
    for inputs in fresh_inputs(lowered.case):
        reference, ratio = lowered.function(*inputs)
        denoised, log_ratio = lowered.graph(*inputs)
        assert largest_error(denoised, reference) < FLOAT32_TOL
        torch.testing.assert_close(log_ratio, ratio, rtol=FLOAT32_TOL, atol=FLOAT32_TOL)


@torch.no_grad()
def test_runtimes_guidance_makes_most_of_what_is_compared(lowered: Lowered) -> None:
    """So that a gradient that is wrong, or left from the trace, would show."""
    x, sigma = at_levels(lowered.case.batch, seed=5, first=2)
    labels = one_hot(lowered.case.batch, lowered.case.classes)
    plain, _ = guided_denoiser(lowered.networks[0], [])(x, sigma, labels)
    guided, _ = lowered.function(x, sigma, labels)
    other, _ = lowered.function(x.flip(-1) + 0.3, sigma, labels)
    guidance, elsewhere = (
        guided - plain,
        other - guided_denoiser(lowered.networks[0], [])(x.flip(-1) + 0.3, sigma, labels)[0],
    )
    for mine, there, without in zip(guidance, elsewhere, plain, strict=True):
        assert mine.abs().max() > 0.5 * without.abs().max()
        assert (mine - there).abs().max() > 0.1 * mine.abs().max()


def test_runtimes_lowered_graph_has_operations_of_inference_alone(lowered: Lowered) -> None:
    forbidden = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
    for node in lowered.operations():
        assert node.op == "call_function", f"{node.op} {node.target}"
        if node.target is operator.getitem:
            continue
        assert isinstance(node.target, torch._ops.OpOverload) and node.target not in forbidden
        assert not node.target._schema.is_mutable, f"{node.target} writes to its argument"
        assert "convolution_backward" not in str(node.target) and "autograd" not in str(node.target)
        assert node.target.namespace == "aten"


def test_runtimes_lowered_graph_computes_nothing_from_weights_alone(lowered: Lowered) -> None:
    """Every operation waits for an input, and every convolution reads its weights as they lie."""
    waiting = set()
    for node in lowered.graph.graph.nodes:
        if node.op == "placeholder" or any(n in waiting for n in node.all_input_nodes):
            waiting.add(node)
    assert all(node in waiting for node in lowered.operations())
    convolutions = [node for node in lowered.operations() if node.target is aten.convolution.default]
    read = [node.all_input_nodes[:2] for node in convolutions]
    assert len(convolutions) > 20 and all(weight.op == "get_attr" for _, weight in read)
    inputs = [image.meta["val"] for image, _ in read]
    if lowered.case.channels_last:
        assert all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


def test_runtimes_lowering_leaves_the_networks_alone(lowered: Lowered) -> None:
    for (before, stride), (after, other) in zip(lowered.state, weights_of(lowered.networks), strict=True):
        assert torch.equal(before, after) and stride == other


@torch.no_grad()
def test_runtimes_lowered_graph_keeps_nothing_from_one_call_to_the_next(lowered: Lowered) -> None:
    (first, *others) = fresh_inputs(lowered.case)
    result = lowered.graph(*first)[0]
    for inputs in others:
        lowered.graph(*inputs)
    assert torch.equal(lowered.graph(*first)[0], result)


@torch.no_grad()
def test_runtimes_fused_network_equals_eager_and_repeats_its_regions(lowered: Lowered) -> None:
    """With the packed convolutions of oneDNN too, which is what `compiled.build` runs on the CPU."""
    graph = copy.deepcopy(lowered.graph)
    kinds = regions.fuse(graph, lowered.case.batch)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    if lowered.case.channels_last:
        assert len(calls) > kinds > 5
        assert not {aten.native_group_norm.default, aten.silu.default} & {node.target for node in graph.graph.nodes}
        if onednn.available():
            onednn.pack(graph)
            assert aten.convolution.default not in [node.target for node in graph.graph.nodes]
    for inputs in fresh_inputs(lowered.case):
        reference, ratio = lowered.function(*inputs)
        denoised, log_ratio = graph(*inputs)
        assert largest_error(denoised, reference) < FLOAT32_TOL
        torch.testing.assert_close(log_ratio, ratio, rtol=FLOAT32_TOL, atol=FLOAT32_TOL)
