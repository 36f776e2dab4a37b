"""The judges of EDM2's sampler."""

from typing import Any

import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.golden import SAMPLER_TOL, Golden
from tests.support.golden_networks import KINDS
from tests.support.golden_samplers import Recorder, one_level

_SIGMA_TOL = 1e-5  # relative: the official levels are computed in float32


class Answers(Recorder):
    """A recorder that keeps what the denoiser returned too."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.answers: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        self.answers.append(super().__call__(x, sigma, class_labels))
        return self.answers[-1]


def judge_edm2_sampler(golden: Golden) -> None:
    nets = {}
    for name, spec in golden.meta["networks"].items():
        nets[name] = golden.filled_net(KINDS[spec["cls"]], spec["config"], spec["prefix"])
        golden.compare_names(nets[name], golden.meta["state_dicts"][name], f"state_dicts {name}")
    for tag, case in golden.meta["cases"].items():
        _judge_case(golden, tag, case, nets)


def _judge_case(golden: Golden, tag: str, case: dict[str, Any], nets: dict[str, Any]) -> None:
    options = dict(case["kwargs"])
    guidance = GuidanceConfig(autoguidance=options.pop("guidance", 1.0))
    config = SamplingConfig(state_dtype=options.pop("dtype", "float32"), **{"num_steps": 32, **options})
    net, reference = Answers(nets[case["net"]]), case["gnet"] and Answers(nets[case["gnet"]])
    sampler = Sampler(Networks(net, reference=reference), config, guidance)
    latents, noises = golden.tensor("noise"), golden.tensor("noises")
    drawing = [step.index for step in sampler.steps if step.churns]
    left = iter(noises[drawing])
    states: list[Tensor] = []
    labels = golden.labels() if net.label_dim else None
    x = sampler.integrate(latents, labels, left.__next__, lambda _, x, *rest: states.append(x))
    assert next(left, None) is None, f"{tag}: it drew less noise than the official sampler"
    if f"{tag}/churn_steps" in golden.arrays:
        golden.judge(f"{tag}/churn_steps", torch.tensor(drawing), _SIGMA_TOL)
    golden.judge(f"{tag}/x", x, SAMPLER_TOL)
    golden.judge(f"{tag}/sigma_calls", torch.stack([one_level(s) for s in net.sigmas]), _SIGMA_TOL, "relative")
    golden.judge_all(f"{tag}/x_steps", torch.stack([sampler.first_state(latents), *states[:-1]]), SAMPLER_TOL)
    for name, recorder in (("D_first", net), ("ref_first", reference)):
        if golden.wants(f"{tag}/{name}"):
            golden.judge_all(f"{tag}/{name}", torch.stack(recorder.answers[::2]), SAMPLER_TOL)
