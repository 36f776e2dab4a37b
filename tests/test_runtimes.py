"""Runtimes change how a guided denoiser runs and never what it returns: each stage of the way against plain torch."""

import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.nets.discriminator import Discriminator
from dgfast.networks import Networks
from dgfast.runtimes import compiled, cuda_graph, onednn, regions
from dgfast.runtimes.graph import Function, lower, trace
from dgfast.runtimes.group_norm import DECOMPOSITIONS
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
Example = Sequence[Tensor | None]
aten = torch.ops.aten

FLOAT32_TOL = 2e-5  # relative, and sample by sample: float32 in another order of summation
WINDOW = (0.2, 0.8)  # of tau: noise levels of about 0.7 to 26
LEVELS = (0.002, 0.6, 0.9, 3.0, 20.0, 80.0)  # below, inside and above
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noisy_images(batch: int, seed: int, size: int = 8) -> Tensor:
    return torch.randn(batch, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at_levels(batch: int, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """x and sigma: a batch in which every sample has a noise level of its own."""
    levels = [LEVELS[(first + k) % len(LEVELS)] for k in range(batch)]
    sigma = torch.tensor(levels, dtype=torch.float64)
    return (0.5 + sigma).view(-1, 1, 1, 1) * noisy_images(batch, seed), sigma


def one_hot(batch: int, classes: int) -> Tensor | None:
    return F.one_hot(torch.arange(batch) % classes, classes).float() if classes else None


def largest_error(mine: Tensor, reference: Tensor) -> float:
    """The largest relative error of a sample."""
    assert mine.shape == reference.shape and mine.dtype == reference.dtype
    errors = (mine - reference).abs().flatten(1).amax(1) / reference.abs().flatten(1).amax(1)
    return errors.max().item()


def layout(x: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the dimensions in which there is any step to take."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.fixture(scope="module")
def small_discriminator(filled_net: Callable[..., nn.Module]) -> Callable[[int], Discriminator]:
    """(classes) -> a discriminator of both parts with every kind of layer, as few of them as can be."""

    def discriminator(classes: int) -> Discriminator:
        common = {"model_channels": 16, "num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16}
        trunk = {"image_size": 8, "in_channels": 1, "out_channels": 4, "channel_mult": [1, 1], "resblock_updown": True}
        head = {"image_size": 4, "in_channels": 16, "out_channels": 1, "channel_mult": [1], "pool": "attention"}
        return Discriminator(
            filled_net("EncoderUNetModel", common | trunk, "small/trunk/"),
            filled_net("EncoderUNetModel", common | head | {"num_classes": classes}, "small/head/"),
        ).eval()

    return discriminator


# The graph ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A guided denoiser to lower."""

    model_type: str
    classes: int
    batch: int
    channels_last: bool

    def __str__(self) -> str:
        order = "nhwc" if self.channels_last else "nchw"
        return f"{self.model_type}, {self.classes} classes, batch {self.batch}, {order}"


@dataclass
class Lowered:
    """What became of it. `state` is a copy of its networks' weights, made before, with their memory order."""

    case: Case
    function: Function
    graph: GraphModule
    networks: list[nn.Module]
    state: list[tuple[Tensor, tuple[int, ...]]]

    def operations(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


CASES = [
    Case("SongUNet", 0, 3, True),
    Case("SongUNet", 0, 3, False),
    Case("SongUNet", 0, 1, True),
    Case("DhariwalUNet", 3, 3, True),
    Case("DhariwalUNet", 3, 1, False),
]


def weights_of(networks: list[nn.Module]) -> list[tuple[Tensor, tuple[int, ...]]]:
    return [(tensor.clone(), tensor.stride()) for net in networks for tensor in net.state_dict().values()]


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


def fresh_inputs(case: Case) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """None of them what was traced; every noise level in its turn, labels in another order."""
    for first in range(0, len(LEVELS), case.batch):
        labels = one_hot(case.batch, case.classes)
        yield *at_levels(case.batch, seed=1 + first, first=first), None if labels is None else labels.flip(0)


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
    assert len(convolutions) > 20 and all(node.args[1].op == "get_attr" for node in convolutions)
    inputs = [node.args[0].meta["val"] for node in convolutions]
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


# Convolutions' input gradients ----------------------------------------------------------------------------------------
@dataclass
class Convolution:
    """One convolution, in any of its forms, as (x) -> y."""

    size: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    groups: int
    channels: tuple[int, int]  # in and out, a group
    transposed: bool

    def weight(self) -> Tensor:
        ins, outs = self.channels
        rows, columns = (ins * self.groups, outs) if self.transposed else (outs * self.groups, ins)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(rows, columns, *self.kernel, dtype=torch.float64, generator=generator)

    def image(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, self.channels[0] * self.groups, *self.size, dtype=torch.float64, generator=generator)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    @property
    def turns(self) -> bool:
        """Whether its input gradient can be written as a convolution that is not transposed."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        inside = all(p <= r for p, r in zip(self.padding, reach, strict=True))
        return self.transposed or (set(self.stride) == {1} and self.groups == 1 and inside)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    dims, transposed = draw(st.sampled_from([1, 2])), draw(st.booleans())

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dims)]

    kernel, padding, dilation = each(1, 4), each(0, 4), each(1, 2)
    stride = [1] * dims if draw(st.booleans()) else each(1, 3)
    size, output_padding = each(0, 5), [0] * dims
    for i in range(dims):
        reach = dilation[i] * (kernel[i] - 1)
        if transposed:
            output_padding[i] = draw(st.integers(0, max(stride[i], dilation[i]) - 1))
            shortest = (2 * padding[i] - reach - output_padding[i]) // stride[i] + 2  # one pixel comes out
        else:
            shortest = reach + 1 - 2 * padding[i]
        size[i] += max(1, shortest)
    groups, channels = draw(st.sampled_from([1, 1, 2, 3])), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return Convolution(size, kernel, stride, padding, dilation, output_padding, groups, channels, transposed)


@settings(max_examples=60)
@given(convolution=convolutions(), channels_last=st.booleans())
def test_runtimes_input_gradient_of_any_convolution_is_a_convolution(
    convolution: Convolution, channels_last: bool
) -> None:
    weight = convolution.weight()

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(convolution(x, weight).square().sum(), x)

    graph = lower(trace(gradient, [convolution.image(0)]), [convolution.image(0)], channels_last)
    x = convolution.image(2)
    torch.testing.assert_close(graph(x)[0], gradient(x)[0], rtol=1e-12, atol=1e-12)
    found = [node for node in graph.graph.nodes if node.target is aten.convolution.default]
    assert len(found) == 2 and "backward" not in graph.code
    assert [node.args[6] for node in found] == [convolution.transposed, not convolution.turns]


def test_runtimes_gradients_of_weights_are_refused() -> None:
    weight = torch.ones(1, 1, 3, 3, requires_grad=True)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.conv2d(x, weight).square().sum(), [x, weight])

    example = [torch.ones(1, 1, 5, 5)]
    with pytest.raises(UserError, match="freeze it"):
        lower(trace(gradient, example), example)


# What cannot be traced ------------------------------------------------------------------------------------------------
class BranchesOnValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class ReadsValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class LoopsOverValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * sum(x.flatten().tolist())


class SelectsByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


@pytest.mark.parametrize("module", [BranchesOnValue, ReadsValue, LoopsOverValues, SelectsByValue, LeavesTorch])
def test_runtimes_network_that_does_not_trace_is_named_with_the_reason(module: type[nn.Module]) -> None:
    net = Outer(module())
    with pytest.raises(UserError, match="this network does not trace: ") as error:
        trace(lambda x: (net(x),), [torch.ones(3)])
    message = str(error.value.message)
    assert "\n" not in message and message.endswith("; run it without --compile")
    assert f"(in Outer.{module.__name__})" in message
    reason = message.removeprefix("this network does not trace: ").split(" (in ")[0]
    assert len(reason) > 10


class ReadsItsOwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("scale").item()


def test_runtimes_network_may_read_its_own_weights() -> None:
    """They stay what they are; only what is read of an input would be another value in the next call."""
    net = Outer(ReadsItsOwnWeight())
    graph = trace(lambda x: (net(x),), [torch.ones(3)])
    assert torch.equal(graph(torch.full((3,), 2.0))[0], torch.full((3,), 7.0))


def test_runtimes_function_outside_of_any_module_is_not_named_a_module() -> None:
    with pytest.raises(UserError, match="does not trace") as error:
        trace(lambda x: (x if x.sum() > 0 else -x,), [torch.ones(3)])
    assert "(in " not in str(error.value.message)


def test_runtimes_tracing_costs_no_memory_of_the_batch() -> None:
    """Ten terabytes of images: none of them is ever made."""
    x = torch.zeros(1).expand(10**9, 3, 32, 32)
    graph = trace(lambda x: (F.silu(x) * 2 + F.conv2d(x, torch.ones(3, 3, 3, 3), padding=1),), [x])
    (output,) = graph.graph.output_node().args[0]  # type: ignore[misc]
    assert output.meta["val"].shape == x.shape


# Regions --------------------------------------------------------------------------------------------------------------
class Checked:
    """Stands for a compiler: runs the region's graph, and insists on what was promised of its inputs, as compiled
    code does."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.calls: list[str] = []

    def __call__(self, cut: dict[str, Callable[[], regions.Region]]) -> dict[str, Callable[..., Any]]:
        self.kinds += cut
        return {kind: self.checked(kind, *extract()) for kind, extract in cut.items()}

    def checked(self, kind: str, graph: GraphModule, example: list[Any]) -> Callable[..., Any]:

        def run(*inputs: Any) -> Any:
            self.calls.append(kind)
            for given_, promised in zip(inputs, example, strict=True):
                if isinstance(promised, Tensor):
                    assert given_.shape == promised.shape and given_.dtype == promised.dtype
                    assert layout(given_) == layout(promised)
            return graph(*inputs)

        return run


Operation = tuple[str, int, int]
POINTWISE = ("add", "mul", "silu", "sigmoid", "neg", "norm")
SHAPE = (4, 4)


@st.composite
def programs(draw: st.DrawFn) -> list[Operation]:
    """Operations, each on two values made before it: 0 and 1 are the inputs."""
    names = st.sampled_from([*POINTWISE, "transpose", "product", "expensive"])
    return [
        (draw(names), draw(st.integers(0, i + 1)), draw(st.integers(0, i + 1))) for i in range(draw(st.integers(2, 24)))
    ]


def run_program(program: list[Operation], *inputs: Tensor) -> tuple[Tensor, ...]:
    values = list(inputs)
    for name, first, second in program:
        a, b = values[first], values[second]
        match name:
            case "add":
                value = (a + b) / 2
            case "mul":
                value = a * b.sigmoid()
            case "silu":
                value = F.silu(a)
            case "sigmoid":
                value = a.sigmoid()
            case "neg":
                value = -a
            case "norm":
                value = F.group_norm(a[None], 2)[0]
            case "transpose":
                value = a.t()
            case "product":
                value = (a @ b) / 4
            case _:
                value = a.tanh()
        values.append(value)
    return tuple(values[-3:])


@settings(max_examples=40)
@given(program=programs())
def test_runtimes_fused_regions_compute_what_their_operations_did(program: list[Operation]) -> None:
    """In any graph: no region waits for itself, none is left out or run before its inputs are there."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return run_program(program, *inputs)

    generator = torch.Generator().manual_seed(0)
    example, inputs = ([torch.randn(SHAPE, generator=generator) for _ in range(2)] for _ in range(2))
    graph = lower(trace(function, example), example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_WORTHWHILE", 0.0)
        compiler = Checked()
        count = regions.fuse(graph, compiler)
    for found, wanted in zip(graph(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert count == len(compiler.kinds) == len(set(compiler.kinds))
    assert set(compiler.calls) == set(compiler.kinds)


def convolution_blocks(x: Tensor, weights: list[Tensor], step: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    for weight in weights:
        x = step(F.conv2d(x, weight, padding=1))
    return (x,)


def test_runtimes_equal_regions_are_compiled_once() -> None:
    """Equal but for their weights and place; a constant that differs makes another kind."""
    weights = [torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(k)) / 6 for k in range(6)]
    scales = iter([2.0, 2.0, 2.0, 2.0, 3.0, 3.0])
    bias = [torch.randn(4, 1, 1) for _ in weights]
    place = iter(range(6))

    def step(x: Tensor) -> Tensor:
        return F.silu(x + bias[next(place)]) * next(scales) + 1

    x = torch.randn(2, 4, 8, 8)
    traced = trace(lambda x: convolution_blocks(x, weights, step), [x])
    wanted = traced(x + 1)[0]
    graph, compiler = lower(traced, [x]), Checked()
    assert regions.fuse(graph, compiler) == len(compiler.kinds) == 2
    found = graph(x + 1)[0]
    torch.testing.assert_close(found, wanted)
    assert [compiler.calls.count(kind) for kind in compiler.kinds] == [4, 2]
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"].count(aten.silu.default) == 0


def test_runtimes_regions_that_would_save_little_are_left_alone() -> None:
    """Less than a hundredth of what all would save; seen together, though, when there are many of a kind."""

    def function(large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        return F.silu(large) * 2 + 1, F.silu(small) * 3 + 1

    for size, fused in ((10, 1), (10_000, 2)):
        example = [torch.randn(1, 100_000), torch.randn(1, size)]
        graph, compiler = lower(trace(function, example), example), Checked()
        assert regions.fuse(graph, compiler) == fused
        assert [node.target for node in graph.graph.nodes].count(aten.silu.default) == 2 - fused
        torch.testing.assert_close(graph(*example), function(*example))

    def many(large: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
        return F.silu(large) * 2 + 1, *(F.silu(x) * 3 + 1 for x in small)

    example = [torch.randn(1, 100_000), *(torch.randn(1, 10) for _ in range(200))]
    assert regions.fuse(lower(trace(many, example), example), Checked()) == 2


def test_runtimes_nothing_to_fuse_is_nothing_changed() -> None:
    x = torch.randn(4, 4)
    graph = lower(trace(lambda x: (x @ x,), [x]), [x])
    assert regions.fuse(graph, Checked()) == 0
    assert torch.equal(graph(x)[0], x @ x)


@torch.no_grad()
def test_runtimes_fused_network_equals_eager_and_repeats_its_regions(lowered: Lowered) -> None:
    """With the packed convolutions of oneDNN too, which is what `compiled.build` runs on the CPU."""
    graph, compiler = copy.deepcopy(lowered.graph), Checked()
    assert regions.fuse(graph, compiler) == len(compiler.kinds)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert len(calls) > len(compiler.kinds) > 5
    if onednn.available() and lowered.case.channels_last:
        onednn.pack(graph)
        assert aten.convolution.default not in [node.target for node in graph.graph.nodes]
    for inputs in fresh_inputs(lowered.case):
        reference, ratio = lowered.function(*inputs)
        denoised, log_ratio = graph(*inputs)
        assert largest_error(denoised, reference) < FLOAT32_TOL
        torch.testing.assert_close(log_ratio, ratio, rtol=FLOAT32_TOL, atol=FLOAT32_TOL)


# Group normalisation --------------------------------------------------------------------------------------------------
NORM_TOL = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # float64 too is computed in float32


def norm_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, affine: str, order: str, mean: float, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, dy, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).to(weight_dtype) for _ in range(2))
    x, dy = (x + mean).to(dtype), dy.to(dtype)
    if order == "nhwc":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    return x, dy, weight if affine else None, bias if affine == "weight and bias" else None


@pytest.mark.parametrize("order", ["nchw", "nhwc"])
@pytest.mark.parametrize("affine", ["", "weight", "weight and bias"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 3), 2), ((3, 8, 7), 4), ((1, 4, 1, 1), 2), ((2, 4, 3, 3), 4), ((2, 4, 3, 3), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", NORM_TOL, ids=str)
def test_runtimes_group_norm_equals_atens(
    dtype: torch.dtype, shape: tuple[int, ...], groups: int, affine: str, order: str
) -> None:
    x, dy, weight, bias = norm_arguments(shape, dtype, affine, order, 0.3, dtype)
    sizes = shape[0], shape[1], math.prod(shape[2:]), groups
    forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default
    wanted = forward(x.contiguous(), weight, bias, *sizes, 1e-5)
    found = DECOMPOSITIONS[forward](x, weight, bias, *sizes, 1e-5)
    assert layout(found[0]) == layout(x)
    for mine, reference in zip(found, wanted, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=NORM_TOL[dtype], atol=NORM_TOL[dtype])
    mask = [True, False, False]
    gradient = backward(dy.contiguous(), x.contiguous(), wanted[1], wanted[2], weight, *sizes, mask)[0]
    mine, *nothing = DECOMPOSITIONS[backward](dy, x, wanted[1], wanted[2], weight, *sizes, mask)
    assert mine.dtype == x.dtype and layout(mine) == layout(x) and nothing == [None, None]
    scale = 1 if gradient.numel() == 4 else gradient.abs().max().item()  # of one pixel a channel it is mostly rounding
    torch.testing.assert_close(mine / scale, gradient / scale, rtol=0, atol=NORM_TOL[dtype] * 10)


def test_runtimes_group_norm_of_another_type_than_its_weights_keeps_atens_types() -> None:
    x, _, weight, bias = norm_arguments((2, 8, 4, 4), torch.bfloat16, "weight and bias", "nchw", 0.0, torch.float32)
    forward = aten.native_group_norm.default
    wanted = forward(x, weight, bias, 2, 8, 16, 4, 1e-5)
    found = DECOMPOSITIONS[forward](x, weight, bias, 2, 8, 16, 4, 1e-5)
    assert [t.dtype for t in found] == [t.dtype for t in wanted] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (2, 8, 256)], ids=str)
def test_runtimes_group_norm_survives_a_mean_a_thousand_times_the_spread(shape: tuple[int, ...]) -> None:
    """The variance as E[x^2] - E[x]^2 would be off by several per cent here."""
    x, dy, weight, bias = norm_arguments(shape, torch.float32, "weight and bias", "nhwc", 1e3, torch.float32)
    forward, backward = aten.native_group_norm.default, aten.native_group_norm_backward.default
    wide, slope = x.double().contiguous(), dy.double().contiguous()
    exact = forward(wide, weight.double(), bias.double(), 2, 8, 256, 4, 1e-5)  # type: ignore[union-attr]
    found = DECOMPOSITIONS[forward](x, weight, bias, 2, 8, 256, 4, 1e-5)
    for mine, reference, tol in zip(found, exact, (5e-4, 1e-6, 1e-5), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=tol, atol=tol)
    mask = [True, False, False]
    gradient = backward(slope, wide, exact[1], exact[2], weight.double(), 2, 8, 256, 4, mask)[0]  # type: ignore[union-attr]
    mine = DECOMPOSITIONS[backward](dy, x, found[1], found[2], weight, 2, 8, 256, 4, mask)[0]
    torch.testing.assert_close(mine.double(), gradient, rtol=0, atol=5e-4)


# oneDNN ---------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
def test_runtimes_onednn_packs_what_it_may_and_nothing_else() -> None:
    """2-D, float32, constant weights; every stride, padding, dilation and group. The rest stays as it is."""
    generator = torch.Generator().manual_seed(3)
    plain, grouped, last, narrow = (
        torch.randn(size, generator=generator) for size in ((6, 4, 3, 3), (6, 3, 3, 2), (6, 2, 3, 3), (2, 2, 3))
    )
    bias = torch.randn(6, generator=generator)

    def function(x: Tensor, given_weight: Tensor) -> tuple[Tensor, ...]:
        y = F.conv2d(x, plain, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        y = F.silu(F.conv2d(y, grouped, padding=1, groups=2))
        up = F.conv_transpose2d(y, last, stride=2)
        line = F.conv1d(up.mean(2), narrow)
        return up, line, F.conv2d(x, given_weight), F.conv2d(x.double(), plain.double())

    example = [torch.randn(2, 4, 9, 8, generator=generator), torch.randn(3, 4, 1, 1, generator=generator)]
    for channels_last in (False, True):
        graph = lower(trace(function, example), example, channels_last)
        inputs = [torch.randn(x.shape, generator=generator) for x in example]
        onednn.pack(graph)
        for found, wanted in zip(graph(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        left = [node for node in graph.graph.nodes if node.target is aten.convolution.default]
        kinds = [(node.args[6], node.meta["val"].dim(), node.meta["val"].dtype) for node in left]
        unpacked = [(True, 4, torch.float32), (False, 4, torch.float32), (False, 4, torch.float64)]
        if not channels_last:  # a line is a 2-D convolution of height 1 there
            unpacked.insert(1, (False, 3, torch.float32))
        assert kinds == unpacked
        packed = [node for node in graph.graph.nodes if "_convolution_pointwise" in str(node.target)]
        assert len(packed) == 3 if channels_last else 2


# Compiled -------------------------------------------------------------------------------------------------------------
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
        patch.setattr(regions, "_WORTHWHILE", 0.05)
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


# A runtime of whole steps ---------------------------------------------------------------------------------------------
class Recording:
    """A runtime that checks every function it is given to be pure, and counts."""

    def __init__(self) -> None:
        self.built = 0
        self.calls = 0

    def __call__(self, function: Function, example: Example) -> Function:
        self.built += 1
        shapes = [None if x is None else (x.shape, x.dtype) for x in example]

        def run(*arguments: Tensor | None) -> tuple[Tensor, ...]:
            self.calls += 1
            assert [None if x is None else (x.shape, x.dtype) for x in arguments] == shapes
            copies = [None if x is None else x.clone() for x in arguments]
            first, second = function(*arguments), function(*copies)
            for given_, copied in zip(arguments, copies, strict=True):
                assert given_ is None or torch.equal(given_, copied)
            for one, two in zip(first, second, strict=True):
                assert torch.equal(one, two)
            return second

        return run


@pytest.mark.parametrize(
    ("sampling", "guidance"),
    [
        (SamplingConfig(num_steps=8), GuidanceConfig(dg_weight=1.0, dg_weight_2nd=0.5, dg_window=WINDOW)),
        (SamplingConfig(num_steps=5, solver="euler"), GuidanceConfig(dg_weight=1.0, dg_window=WINDOW)),
        (SamplingConfig(num_steps=5, solver="dpmpp-2m"), GuidanceConfig(dg_weight=1.0, dg_window=WINDOW)),
        (SamplingConfig(num_steps=6, S_churn=3.0), GuidanceConfig(dg_weight=1.0, boosting=True, cfg_scale=2.0)),
    ],
    ids=["heun", "euler", "dpmpp-2m", "churn, boosting, free"],
)
def test_runtimes_of_whole_steps_change_nothing(
    tiny_net: NetFactory,
    small_discriminator: Callable[[int], Discriminator],
    sampling: SamplingConfig,
    guidance: GuidanceConfig,
) -> None:
    """And each different step is built once a size, by `prepare`: sampling builds none."""
    networks = Networks(tiny_net(label_dim=3, channel_mult=[1]), small_discriminator(3))
    runtime, of_denoiser = Recording(), Recording()
    sampler = Sampler(networks, sampling, guidance, step_runtime=runtime, runtime=of_denoiser)
    multistep = sampling.solver == "dpmpp-2m"  # whose first step knows no last one
    kinds = len({(step.predictor, step.corrector, multistep and step.index == 0) for step in sampler.steps})
    calls_of_net = {call for step in sampler.steps for call in (step.predictor, step.corrector) if call is not None}
    assert 2 <= kinds < len(sampler.steps)
    sampler.prepare(2)
    assert runtime.built == kinds and of_denoiser.built == len(calls_of_net)
    calls = runtime.calls
    plain = Sampler(networks, sampling, guidance)
    for labels in (None, [2, 0]):
        assert torch.equal(sampler([4, 5], labels), plain([4, 5], labels))
    assert runtime.built == kinds and of_denoiser.built == len(calls_of_net)
    assert runtime.calls == calls + 2 * len(sampler.steps)
    assert torch.equal(sampler([6]), plain([6]))
    assert runtime.built == 2 * kinds and of_denoiser.built == 2 * len(calls_of_net)  # another size


def test_runtimes_of_whole_steps_are_left_out_under_reuse(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator]
) -> None:
    """What is carried over lives outside of any one step; the results are those without the runtime."""
    networks, runtime = Networks(tiny_net(), small_discriminator(0)), Recording()
    guidance = GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0, dg_every=2)
    sampler = Sampler(networks, SamplingConfig(num_steps=5), guidance, step_runtime=runtime)
    sampler.prepare(2)
    assert torch.equal(sampler([4, 5]), Sampler(networks, SamplingConfig(num_steps=5), guidance)([4, 5]))
    assert runtime.built == 0


# CUDA graphs ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def usual_kernels() -> Iterator[None]:
    """cuBLAS is deterministic only under a variable of the environment that must be set before it starts."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@ON_CUDA
def test_runtimes_cuda_graph_computes_with_what_it_is_given() -> None:
    def function(x: Tensor, missing: Tensor | None, scale: Tensor) -> tuple[Tensor, ...]:
        assert missing is None
        return F.silu(x) * scale, x.sum(-1)

    def inputs(seed: int) -> tuple[Tensor, None, Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(4, 6, device="cuda", generator=generator), None, torch.full((), seed + 1.0, device="cuda")

    example = inputs(0)
    run = cuda_graph.build(function, example)
    results = [run(*inputs(seed)) for seed in (1, 2)]  # the second must not overwrite the first
    for seed, result in zip((1, 2), results, strict=True):
        torch.testing.assert_close(result, function(*inputs(seed)))
    torch.testing.assert_close(example, inputs(0))


@ON_CUDA
@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m"])
def test_runtimes_cuda_graph_of_whole_steps_equals_eager(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator], solver: str, usual_kernels: None
) -> None:
    net, discriminator = (copy.deepcopy(n).cuda() for n in (tiny_net(label_dim=3), small_discriminator(3)))
    sampling, guidance = SamplingConfig(num_steps=5, solver=solver, S_churn=0.0), GuidanceConfig(1.0, 0.5)
    networks = Networks(net, discriminator)
    sampler = Sampler(networks, sampling, guidance, step_runtime=cuda_graph.build)
    sampler.prepare(2)
    images = [sampler([1, 2]), sampler([3, 4])]
    plain = Sampler(networks, sampling, guidance)
    for mine, seeds in zip(images, ([1, 2], [3, 4]), strict=True):
        torch.testing.assert_close(mine, plain(seeds), rtol=1e-3, atol=1e-3)
