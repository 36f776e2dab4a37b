"""A runtime of a solver's whole steps, such as a CUDA graph, changes nothing."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.graph import Function
from dgfast.nets.discriminator import Discriminator
from dgfast.networks import Networks
from dgfast.runtimes import RUNTIMES, Build, Runtime
from dgfast.runtimes.cuda.capture import capture
from dgfast.sampler import Sampler
from tests.support.runtimes import ON_CUDA, WINDOW, Example, NetFactory


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
            for argument, copied in zip(arguments, copies, strict=True):
                assert argument is None or copied is None or torch.equal(argument, copied)
            for one, two in zip(first, second, strict=True):
                assert torch.equal(one, two)
            return second

        return run


def of_steps(capture: Build) -> Runtime:
    """Eager calls in captured steps."""
    return replace(RUNTIMES["eager"], capture=lambda device: capture)


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
    runtime, of_denoiser, announced = Recording(), Recording(), list[int]()
    recording = Runtime("recording", of_denoiser, lambda _: runtime, prepare=lambda fs: announced.append(len(fs)))
    sampler = Sampler(networks, sampling, guidance, runtime=recording)
    kinds = len({(step.predictor, step.corrector) for step in sampler.steps})
    calls_of_net = {call for step in sampler.steps for call in (step.predictor, step.corrector) if call is not None}
    assert 2 <= kinds < len(sampler.steps)
    sampler.prepare(2)
    assert runtime.built == kinds and of_denoiser.built == len(calls_of_net) and announced == [of_denoiser.built]
    calls = runtime.calls
    plain = Sampler(networks, sampling, guidance)
    for labels in (None, [2, 0]):
        assert torch.equal(sampler([4, 5], labels), plain([4, 5], labels))
    assert runtime.built == kinds and of_denoiser.built == len(calls_of_net)
    assert runtime.calls == calls + 2 * len(sampler.steps)
    assert torch.equal(sampler([6]), plain([6]))
    assert runtime.built == 2 * kinds and of_denoiser.built == 2 * len(calls_of_net)  # another size
    sampler.forget()
    assert torch.equal(sampler([6]), plain([6]))
    assert runtime.built == 3 * kinds and of_denoiser.built == 3 * len(calls_of_net)


def test_runtimes_of_whole_steps_are_left_out_under_reuse(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator]
) -> None:
    """What is carried over lives outside of any one step; the results are those without the runtime."""
    networks, runtime = Networks(tiny_net(), small_discriminator(0)), Recording()
    guidance = GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0, dg_every=2)
    sampler = Sampler(
        networks,
        SamplingConfig(num_steps=5),
        guidance,
        runtime=of_steps(runtime),
    )
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
    run = capture(function, example)
    results = [run(*inputs(seed)) for seed in (1, 2)]  # the second must not overwrite the first
    for seed, result in zip((1, 2), results, strict=True):
        torch.testing.assert_close(result, function(*inputs(seed)))
    torch.testing.assert_close(example, inputs(0))


@ON_CUDA
@pytest.mark.parametrize("solver", ["heun", "dpmpp-2m"])
def test_runtimes_cuda_graph_of_whole_steps_equals_eager(
    tiny_net: NetFactory, small_discriminator: Callable[[int], Discriminator], solver: str, usual_kernels: None
) -> None:
    net, discriminator = copy.deepcopy(tiny_net(label_dim=3)).cuda(), copy.deepcopy(small_discriminator(3)).cuda()
    sampling, guidance = SamplingConfig(num_steps=5, solver=solver, S_churn=0.0), GuidanceConfig(1.0, 0.5)
    networks = Networks(net, discriminator)
    sampler = Sampler(networks, sampling, guidance, runtime=of_steps(capture))
    sampler.prepare(2)
    images = [sampler([1, 2]), sampler([3, 4])]
    plain = Sampler(networks, sampling, guidance)
    for mine, seeds in zip(images, ([1, 2], [3, 4]), strict=True):
        torch.testing.assert_close(mine, plain(seeds), rtol=1e-3, atol=1e-3)
