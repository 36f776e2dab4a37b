"""An exported step of every solver, run through ONNX Runtime, draws what the sampler draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond
from dgfast.export.joint_graph import joint
from dgfast.nets.discriminator import Discriminator
from dgfast.networks import Networks
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.writer import convert
from dgfast.sampler import Sampler
from dgfast.solvers import SOLVERS

_MORE: dict[str, list[str]] = {
    "dpmpp-2m": ["denoised_last", "sigma_last"], "ddpm": ["noise", "log_least", "log_most"], "ddim": ["noise"],
    "flow-sde": ["noise"], "flow-sde-heun": ["noise"],
}  # fmt: skip
_GUIDANCE = GuidanceConfig(dg_weight=2.0, dg_weight_2nd=0.5)


def _drawn_by_file(engine: OnnxEngine, sampler: Sampler, latents: Tensor, labels: Tensor, noises: list[Tensor]) -> Any:
    """The sampler's plan, each step by the file alone."""
    batch, noise = len(latents), iter(noises)
    x = sampler.first_state(latents)
    more = {"denoised_last": torch.zeros_like(x), "sigma_last": torch.full((batch,), torch.inf)}
    following = [*(step.sigma for step in sampler.steps[1:]), 0.0]
    for step, sigma_next in zip(sampler.steps, following, strict=True):
        least, most = step.log_variances
        numbers = {"sigma": step.sigma, "sigma_next": sigma_next, "log_least": least, "log_most": most}
        more |= {name: torch.full((batch,), number) for name, number in numbers.items()}
        more |= {"noise": next(noise)} if "noise" in engine.inputs else {}
        more |= {name: torch.tensor([getattr(_GUIDANCE, name)]) for name in ("dg_weight", "dg_weight_2nd")}
        inputs = {"x": x, "class_labels": labels, **more}
        results = engine({name: inputs[name].float() for name in engine.inputs})
        x, more["denoised_last"] = results["x_next"], results.get("denoised", x)
        more["sigma_last"] = more["sigma"]
    return x


class Hill(nn.Module):
    """A discriminator whose gradient costs nothing."""

    def forward(self, u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return -(u**2 * (1 + t.view(-1, 1, 1, 1))).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("solver", SOLVERS)
def test_exported_step_draws_what_the_sampler_draws(
    solver: str,
    tiny_net: Callable[..., nn.Module],
    tiny_sit: Callable[..., FlowPrecond],
    small_discriminator: Callable[[int], Discriminator],
    tmp_path: Path,
) -> None:
    score: Any
    if solver.startswith("flow-"):
        score, sampling = tiny_sit(3), SamplingConfig(num_steps=5, solver=solver)
    else:
        score = tiny_net(label_dim=3, channel_mult=[1], attn_resolutions=[])
        sampling = SamplingConfig(num_steps=5, solver=solver, sigma_min=0.1, eta=0.7 if solver == "ddim" else 0.0)
    networks = Networks(score, Hill() if solver.startswith("flow-") else small_discriminator(3))
    subject = joint(networks, sampling, _GUIDANCE, "step")
    save(convert(subject.function, dict(subject.example(2, seed=1)), subject.outputs), tmp_path / "step.onnx")
    engine = OnnxEngine(tmp_path / "step.onnx")
    second = ["dg_weight_2nd"] if SOLVERS[solver].points == 2 else []
    assert list(engine.inputs) == [
        "x",
        "sigma",
        "sigma_next",
        "class_labels",
        *_MORE.get(solver, []),
        "dg_weight",
        *second,
    ]

    draws = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(2, 1, 8, 8, generator=draws), torch.eye(3)[:2]
    noises = [torch.randn(latents.shape, generator=draws) for _ in range(5)]
    sampler = Sampler(networks, sampling, _GUIDANCE)
    eager = sampler.integrate(latents, labels, iter(noises).__next__)
    unguided = Sampler(networks, sampling).integrate(latents, labels, iter(noises).__next__)
    assert (eager - unguided).abs().max() > 0.1 * eager.abs().max(), "the guidance does nothing"
    drawn = _drawn_by_file(engine, sampler, latents, labels, noises)
    assert (drawn - eager).abs().max() < 1e-4 * eager.abs().max()
