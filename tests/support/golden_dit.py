"""The judges of DiT and of DG's code for it, which runs both halves of a doubled batch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import nets
from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.guidance import ClassifierFreeGuidance, DiscriminatorGuidance
from dgfast.guidance.gradient import denoiser_gate
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers import ddpm
from tests.support.golden import DIT_SAMPLER_TOL, NET_TOL, Golden, correction_of, every_nth

_PUBLISHED_CFG_CHANNELS = 3  # DiT's and DG's code guide the first three latent channels alone
_DIT_LEVELS = nl.ddpm_levels("linear", 1000)


def judge_dit(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cases" in golden.meta:
        for tag in golden.meta["cases"]:
            judge_dit_loop(golden, tag, monkeypatch)
    elif "dg_scale" in golden.arrays:
        judge_dit_guidance(golden)
    else:
        judge_dit_network(golden)


def judge_dit_network(golden: Golden) -> None:
    """The raw network, and classifier-free guidance of its noise as the published code does it on a doubled batch."""
    net = golden.net("DiT", "config", "prefix", "state_dict")
    x, y, times = golden.tensor("x"), golden.tensor("y"), golden.tensor("t")
    null, channels = torch.full_like(y, net.null_class), x.shape[1]
    golden.judge_all(
        "pos_embed_init", nets.build("DiT", **golden.meta["config"]).get_parameter("pos_embed")[0], NET_TOL
    )
    golden.judge("out", _kept(golden, "out", torch.stack([net(x, t, y) for t in times])), NET_TOL)
    golden.judge("out_null", _kept(golden, "out_null", net(x, times[1], null)), NET_TOL)
    branch = int(golden.tensor("branch_time"))
    two: dict[str, Any] = {
        "scale": float(golden.tensor("LT_cfg")),
        "scale_low": float(golden.tensor("ST_cfg")),
        "branch": branch,
    }
    for key, scales in (("cfg", {"scale": float(golden.tensor("cfg_scale"))}), ("dg_early", two), ("dg_late", two)):
        # The file does not say at which timestep; the channels that guidance leaves alone do.
        calls = {}
        for t in (branch, branch + 1, 500, 200, 201):
            pair = net(x, torch.tensor([t]), y), net(x, torch.tensor([t]), null)
            outputs = dit_doubled(*pair, channels, torch.full((len(x),), float(t)), **scales)
            calls[t] = _kept(golden, key, outputs)
        reference = golden.tensor(key)
        at = min(calls, key=lambda t: float((calls[t] - reference)[: len(x), _PUBLISHED_CFG_CHANNELS:].abs().max()))
        golden.judge(key, calls[at], NET_TOL)


def _kept(golden: Golden, key: str, full: Tensor) -> Tensor:
    return every_nth(full, golden.arrays[key].shape)


def dit_doubled(conditional: Tensor, unconditional: Tensor, channels: int, level: Tensor, **scales: Any) -> Tensor:
    """Both halves of the published doubled batch: guided channels are the same, the others each half's own."""
    guided = _PUBLISHED_CFG_CHANNELS
    guidance = ClassifierFreeGuidance(lambda *_: unconditional[:, :channels], channels=guided, **scales)
    correction, _ = correction_of(guidance, conditional, level, None, conditional[:, :channels])
    noise = (conditional[:, :channels] + correction).float()
    return torch.cat(
        [
            torch.cat([noise, conditional[:, channels:]], dim=1),
            torch.cat([noise[:, :guided], unconditional[:, guided:]], dim=1),
        ]
    )


def dit_window(time_min: int) -> tuple[float, float]:
    """The VP times of the timesteps above `time_min`; halfway, since the published condition is strict."""
    return float(nl.vp_time(_DIT_LEVELS[[time_min, time_min + 1]]).mean()), 2.0


def dit_time(sigma: Tensor) -> Tensor:
    return (sigma[:, None] - _DIT_LEVELS).abs().argmin(1) / 999


def judge_dit_guidance(golden: Golden) -> None:
    """The discriminator's gradient at latents in VP coordinates, repeated for both halves of the doubled batch."""
    guidance = DiscriminatorGuidance(
        golden.discriminator(), float(golden.tensor("dg_scale")), dit_window(int(golden.tensor("time_min"))), dit_time
    )
    x, labels = golden.tensor("x").double(), F.one_hot(golden.tensor("y"), 1000).float()
    gradients, probabilities = [], []
    for t in golden.tensor("t"):
        sigma = _DIT_LEVELS[t].expand(len(x))
        direction, gate, _ = guidance.correct(x / nl.vp_alpha(sigma)[:, None, None, None], sigma, labels, x)
        gradients.append((gate / denoiser_gate(sigma))[:, None, None, None] * direction)
        probabilities.append(guidance.log_ratio(x.float(), sigma, labels).sigmoid())
    golden.judge_all("guidance", torch.stack(gradients).repeat(1, 2, 1, 1, 1), NET_TOL)
    golden.judge("prob", torch.stack(probabilities), NET_TOL)


def judge_dit_loop(golden: Golden, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ancestral loop; dgfast runs the first half of the published doubled batch, the second is put together."""
    case, raw = golden.meta["cases"][tag], golden.net("DiT", "config", "prefix")
    net = DDPMPrecond(raw, raw.input_size, raw.in_channels, raw.num_classes)
    branch = case["model_kwargs"].get("branch_time")
    scales = {"scale": case["model_kwargs"].get("cfg_scale", case["model_kwargs"].get("LT_cfg"))}
    if branch is not None:
        halfway = float(_DIT_LEVELS[[branch, branch + 1]].mean())
        scales |= {"scale_low": case["model_kwargs"]["ST_cfg"], "branch": halfway}
    guidance = GuidanceConfig(
        dg_weight=case["dg_scale"],
        dg_window=dit_window(case["time_min"]),
        cfg_channels=_PUBLISHED_CFG_CHANNELS,
        **{f"cfg_{name}": value for name, value in scales.items()},
    )
    steps: list[tuple[Tensor, ...]] = []
    gradients: dict[float, Tensor] = {}
    step, correct = ddpm.ancestral_step, DiscriminatorGuidance.correct

    def stepping(*arguments: Tensor) -> Tensor:
        steps.append(arguments)
        return step(*arguments)

    def correcting(self: DiscriminatorGuidance, x: Tensor, sigma: Tensor, *rest: Any) -> Any:
        direction, gate, log_ratio = correct(self, x, sigma, *rest)
        gradients[float(sigma[0])] = (gate / denoiser_gate(sigma)).view(-1, 1, 1, 1) * direction
        return direction, gate, log_ratio

    sampling = SamplingConfig(solver="ddpm", respacing=case["create_diffusion"], clip_denoised=case["clip_denoised"])
    discriminator = golden.discriminator() if case["dg_scale"] else None
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "ancestral_step", stepping)
        patch.setattr(DiscriminatorGuidance, "correct", correcting)
        sampler = Sampler(Networks(net, discriminator, time=net.time), sampling, guidance)
        y, noises = golden.tensor("y"), golden.tensor("noises").double()
        x = sampler.integrate(golden.tensor("z"), F.one_hot(y, raw.num_classes).float(), iter(noises).__next__)

    sigmas = torch.tensor([step.sigma for step in sampler.steps], dtype=torch.float64)
    states = torch.stack([*(arguments[0] for arguments in steps[1:]), x])
    alphas = nl.vp_alpha(torch.cat([sigmas[1:], torch.zeros(1)]))
    golden.judge(f"{tag}/x", x, DIT_SAMPLER_TOL)
    golden.judge_all(f"{tag}/x_steps", alphas.view(-1, 1, 1, 1, 1) * states, DIT_SAMPLER_TOL)
    golden.judge_all(f"{tag}/pred_xstart", torch.stack([arguments[1] for arguments in steps]), DIT_SAMPLER_TOL)
    bounds = nl.posterior_log_variances(sigmas)
    golden.judge(f"{tag}/betas", bounds[:, 1].exp().flip(0), 1e-9, "relative")
    times = net.timesteps(sigmas)
    golden.judge(f"{tag}/timestep_map", times.flip(0).long(), DIT_SAMPLER_TOL)
    if golden.wants(f"{tag}/guidance"):
        norms = [
            gradients[s].flatten(1).norm(dim=1) if s in gradients else torch.zeros(len(x)) for s in sigmas.tolist()
        ]
        golden.judge(f"{tag}/guidance_norm", torch.stack(norms), DIT_SAMPLER_TOL)
        golden.judge(f"{tag}/guidance_t", times.long(), DIT_SAMPLER_TOL)

    second = steps[0][0]
    for (first, *_, t, t_next, noise), bound in zip(steps, bounds, strict=True):
        sigma = t.flatten()
        alpha = nl.vp_alpha(t)
        image, times = (alpha * first).float(), net.timesteps(sigma)
        outputs = raw(image, times, y), raw(image, times, torch.full_like(y, raw.null_class))
        noise_seen, v = dit_doubled(*outputs, raw.in_channels, sigma, **scales)[len(y) :].double().chunk(2, dim=1)
        denoised = second - t * noise_seen
        variance = (bound[0] + (v + 1) / 2 * (bound[1] - bound[0])).exp()
        shift = variance * gradients.get(float(sigma[0]), torch.zeros(()))
        clipped = denoised.clamp(-1, 1) if case["clip_denoised"] else denoised
        second = step(second, clipped, shift, variance, t, t_next, noise)
    golden.judge_all(f"{tag}/x_second_half", second, DIT_SAMPLER_TOL)
