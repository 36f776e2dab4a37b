"""Mixes and repairs compiled and in ONNX, weights as inputs, against eager; and in files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import GuidanceConfig, SamplingConfig, UserError
from dgfast.engines import guided_by, require_fit
from dgfast.export.joint_graph import joint
from dgfast.graph.agreement import relative_error
from dgfast.guidance.declaration import guiding
from dgfast.job import Job
from dgfast.networks import Networks
from dgfast.pure_function import PureFunction
from dgfast.runtimes import RUNTIMES
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
EULER = SamplingConfig(num_steps=4, solver="euler", sigma_max=20.0)
CASES: dict[str, dict[str, Any]] = {
    "apg": {"apg_scale": 4.0, "apg_eta": 0.3, "apg_threshold": 0.5, "cfg_rescale": 0.7},
    "apg with momentum": {"apg_scale": 4.0, "apg_momentum": -0.5, "apg_space": "flow"},
    "cfg++": {"cfgpp_scale": 0.6, "cfg_norm": 0.8},
    "tcfg": {"tcfg_scale": 4.0, "renorm": 1.0},
    "fdg": {"fdg_scale_high": 4.0, "fdg_scale_low": 2.0, "fdg_parallel": 0.5, "dynamic_threshold": 0.9},
    "cfg-zero*": {"zero_star_scale": 4.0, "zero_init_steps": 1},
    "mambo-g": {"mambo_scale": 4.0, "mambo_alpha": 2.0},
}


class Small(nn.Module):
    """A conditional denoiser of two convolutions: what mixes and repairs do to its results is what is looked at."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 8, 3, 0.0, math.inf

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.of_class = nn.Linear(3, 8)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        labels = x.new_zeros(len(x), 3) if class_labels is None else class_labels
        s = sigma.view(-1, 1, 1, 1)
        features = self.first((x / (1 + s**2).sqrt()).float()) + 2 * self.of_class(labels.float())[:, :, None, None]
        return (x / (1 + s**2) + s / (1 + s**2).sqrt() * self.last(features.tanh())).float()

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


def arguments(seed: int, weights: Sequence[float] = ()) -> tuple[Tensor, ...]:
    """x, sigma, labels, a memory and weights."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([0.01, 0.6, 3.0, 20.0])[torch.randperm(4, generator=generator)].double()
    x, last = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64, generator=generator)
    numbers = [torch.tensor([value]) for value in weights]
    return (0.5 + sigma).view(-1, 1, 1, 1) * x, sigma, torch.eye(3)[torch.arange(4) % 3], last, *numbers


def functions(net: Any) -> dict[str, PureFunction]:
    """Each as it is exported, weights its inputs; with a memory, which no file has, as a sampler calls it."""
    jobs = {case: Job(Networks(net), EULER, GuidanceConfig(**options)) for case, options in CASES.items()}
    return {
        case: job.called(job.steps[0].predictor) if job.guidance.apg_momentum else job.exported()
        for case, job in jobs.items()
    }


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
def test_mixes_in_a_runtime_equal_eager(runtime: str) -> None:
    """All of them in one function of a network of two layers, for compiling each with a U-Net takes long."""
    torch.manual_seed(0)
    net: Any = Small().eval().requires_grad_(False)
    alone = functions(net)

    def together(x: Tensor, sigma: Tensor, labels: Tensor, last: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rest, results = iter(weights), list[Tensor]()
        for function in alone.values():
            more = [last] if "memory" in function.inputs else [next(rest) for _ in function.weights]
            results += function(x, sigma, labels, *more)
        return tuple(results)

    weights = [value for function in alone.values() for value in function.weights.values()]
    assert len(weights) == 11
    example, inputs = (arguments(seed, [share * value for value in weights]) for seed, share in ((0, 1.0), (1, 0.9)))
    with torch.no_grad():
        wanted, plain = together(*inputs), net(*inputs[:3])
    names = [f"{case}: {output}" for case, function in alone.items() for output in function.outputs]
    results = RUNTIMES[runtime].build(together, example)(*inputs)
    for name, mine, reference in zip(names, results, wanted, strict=True):
        assert relative_error(mine, reference) < RUNTIMES[runtime].tolerance, name
        if name.endswith("denoised"):
            assert relative_error(reference, plain.double()) > 0.01, name


def test_step_under_cfg_plus_plus_goes_by_the_plan_in_a_file(tiny_net: NetFactory) -> None:
    """At both points of Heun's steps, in one function for all of them."""
    networks: Any = Networks(tiny_net(label_dim=3, channel_mult=[1], attn_resolutions=[]))
    heun, config = replace(EULER, solver="heun"), GuidanceConfig(cfgpp_scale=0.6)
    step = joint(networks, heun, config, "step")
    assert step.inputs == ("x", "sigma", "sigma_next", "class_labels", "cfgpp_scale")
    x, _, labels, _ = arguments(0)
    states = [20.0 * x]
    sampler = Sampler(networks, heun, config)
    sampler.integrate(x, labels, on_step=lambda step, x, *_: states.append(x))
    for k, (sigma, sigma_next) in enumerate(pairwise(step.sigmas)):
        levels = [torch.full((4,), level, dtype=torch.float64) for level in (sigma, sigma_next)]
        (after,) = step.function(states[k], *levels, labels, torch.tensor([0.6]))
        torch.testing.assert_close(after, states[k + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "options", "what", "line"),
    [
        (EULER, {"apg_scale": 2.0, "apg_momentum": 0.5}, "step", "apg_momentum goes from call to call: no exported"),
        (
            replace(EULER, solver="heun"), {"cfgpp_scale": 0.5}, "denoiser",
            "goes by the steps of the plan, at both points of each: export --what step",
        ),
    ],
)  # fmt: skip
def test_what_no_file_can_do_is_refused(
    sampling: SamplingConfig, options: dict[str, Any], what: str, line: str, tiny_net: NetFactory
) -> None:
    networks: Any = Networks(tiny_net(label_dim=3, channel_mult=[1]))
    with pytest.raises(UserError, match=line):
        Job(networks, sampling, GuidanceConfig(**options)).exported(what)


def test_file_made_for_another_plan_is_refused(tiny_net: NetFactory) -> None:
    networks: Any = Networks(tiny_net(label_dim=3, channel_mult=[1]))
    config = GuidanceConfig(cfgpp_scale=0.5)
    sigmas = str([*(step.sigma for step in Job(networks, EULER, config).steps), 0.0])
    engine: Any = SimpleNamespace(path=Path("f.onnx"), inputs={"cfgpp_scale": 1}, metadata={"sigmas": sigmas})
    for sampling, fits in ((EULER, True), (replace(EULER, num_steps=5), False), (replace(EULER, solver="heun"), True)):
        job = Job(networks, sampling, config)
        if fits:
            guided_by(engine, job.called(job.steps[0].predictor))
        other = job.steps[0].corrector if fits else job.steps[0].predictor
        if other:
            with pytest.raises(UserError, match=r"f.onnx goes by other steps than these, on which CFG"):
                guided_by(engine, job.called(other))


def test_momentum_is_refused_beside_an_engine(small_bundle: Any) -> None:
    metadata = {"what": "denoiser", "weights_sha256": small_bundle.fingerprint()}
    engine: Any = SimpleNamespace(path=Path("f.onnx"), inputs={}, metadata=metadata)
    config = GuidanceConfig(apg_scale=2.0, apg_momentum=0.5)
    assert [kind.name for kind in guiding(config)] == ["adaptive projected guidance"]
    with pytest.raises(UserError, match="--apg-momentum goes from call to call, which no exported file remembers"):
        require_fit(engine, small_bundle, small_bundle.sampling, config)
