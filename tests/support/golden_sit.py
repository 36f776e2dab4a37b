"""The judges of SiT: its paths, its network, and its samplers, which run both halves of a doubled batch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast import nets
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond
from dgfast.errors import UserError
from dgfast.flow import PATHS, Path
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers.flow_sde import diffusion
from tests.support.golden import NET_TOL, SAMPLER_TOL, Golden
from tests.support.golden_dit import dit_doubled

PATH_TOL, TIME_TOL, ADAPTIVE_TOL = 1e-10, 1e-6, 1e-3
_FORMS = {
    "w_SBDM": "sbdm", "w_sigma": "sigma", "w_linear": "linear", "w_constant": "constant",
    "w_decreasing": "decreasing", "w_inccreasing-decreasing": "increasing-decreasing",
}  # fmt: skip
# SiT counts points of the ODE's grid, dgfast steps; dopri5 chooses its own, so many of Heun's come as near.
_ODE = {"euler": ("flow-euler", None), "heun2": ("flow-heun", None), "dopri5": ("flow-heun", 128)}
_SDE = {"Euler": "flow-sde", "Heun": "flow-sde-heun"}
_CFG_CHANNELS = 3  # SiT's code guides the first three latent channels alone


def judge_sit(golden: Golden) -> None:
    if "cases" in golden.meta:
        for tag in golden.meta["cases"]:
            judge_sit_sampler(golden, tag)
        judge_infinite_noise(golden)
    elif "x1" in golden.arrays:
        for path in PATHS.values():
            judge_sit_path(golden, path)
    else:
        judge_sit_network(golden)


def judge_sit_path(golden: Golden, path: Path) -> None:
    t, norm = golden.tensor("t"), float(golden.tensor("norm"))
    x, velocity, score, noise, clean = (golden.tensor(key) for key in ("x", "velocity", "score", "x0", "x1"))
    at = t[:, None]
    mine = {
        "alpha": path.s(t), "d_alpha": path.s_deriv(t), "sigma": path.spread(t), "d_sigma": path.spread_deriv(t),
        "drift": -path.s_deriv(at) / path.s(at) * x, "diffusion_var": path.diffusion_of_noising(t),
        "score_from_velocity": path.score(x, velocity, at), "noise_from_velocity": path.noise(x, velocity, at),
        "velocity_from_score": path.velocity_of_noise(x, -path.spread(at) * score, at),
        "xt": path.s(at) * clean + path.spread(at) * noise,
        "ut": path.s_deriv(at) * clean + path.spread_deriv(at) * noise,
    }  # fmt: skip
    mine |= {key: diffusion(form, norm, t, path) for key, form in _FORMS.items()}
    for key, value in mine.items():
        largest = float(abs(golden.arrays[f"{path.name}/{key}"]).max())
        golden.judge(f"{path.name}/{key}", value, PATH_TOL * largest, "absolute")


def flow_net(golden: Golden, path: str = "linear", prediction: str = "velocity") -> FlowPrecond:
    raw = golden.net("DiT", "config", "prefix", "state_dict" if "state_dict" in golden.meta else None)
    shape = raw.input_size, raw.in_channels, raw.num_classes
    return FlowPrecond(raw, *shape, path=path, prediction=prediction).eval()


def judge_sit_network(golden: Golden) -> None:
    """The velocity, the null class, and classifier-free guidance as SiT does it on a doubled batch."""
    net = flow_net(golden)
    x, y, times = golden.tensor("x"), golden.tensor("y"), golden.tensor("t").double()
    labels, sigmas = F.one_hot(y, net.label_dim).float(), net.path.sigma(times)
    built = nets.build("DiT", **golden.meta["config"])
    golden.judge_all("pos_embed_init", built.get_parameter("pos_embed")[0], NET_TOL)
    golden.judge("out", torch.stack([net.velocity(x, sigma, labels) for sigma in sigmas]), NET_TOL)
    golden.judge("out_null", net.velocity(x, sigmas[1], None), NET_TOL)
    pair = net.velocity(x, sigmas[1], labels), net.velocity(x, sigmas[1], None)
    doubled = dit_doubled(*pair, net.img_channels, sigmas[1], scale=float(golden.tensor("cfg_scale")))
    golden.judge("cfg", doubled, NET_TOL)


def judge_sit_sampler(golden: Golden, tag: str) -> None:
    case = golden.meta["cases"][tag]
    net = flow_net(golden, case["transport"]["path_type"].lower(), case["transport"]["prediction"])
    scale = case.get("cfg_scale") or 1.0
    guided = GuidanceConfig(cfg_scale=scale, cfg_channels=_CFG_CHANNELS) if scale != 1 else GuidanceConfig()
    sampler = Sampler(Networks(net), _sampling(case), guided)
    start, noises = golden.tensor("z"), golden.tensor("noises").double()
    states: list[Tensor] = []
    times: list[Tensor] = []

    def noting(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        times.append(arguments[1][0])

    def keeping(step: object, x: Tensor, denoised: Tensor, log_ratio: Tensor) -> None:
        assert denoised.isfinite().all(), f"{tag}: {step}"
        states.append(x)

    hook = net.raw.register_forward_pre_hook(noting)
    x = sampler.integrate(start, F.one_hot(golden.tensor("y"), net.label_dim).float(), iter(noises).__next__, keeping)
    hook.remove()
    adaptive = case.get("ode", {}).get("sampling_method") == "dopri5"
    golden.judge(f"{tag}/x", x, ADAPTIVE_TOL if adaptive else SAMPLER_TOL)
    after = torch.stack([start.double(), *states] if "ode" in case else states)
    golden.judge_all(f"{tag}/x_steps", after, SAMPLER_TOL)
    if golden.wants(f"{tag}/t_calls"):
        once = torch.stack(times)[:: 2 if scale != 1 else 1]  # SiT's doubled batch is two calls here
        asked = once if "ode" in case else once.repeat_interleave(2)  # for its drift and for its score
        golden.judge(f"{tag}/t_calls", asked[: len(golden.arrays[f"{tag}/t_calls"])], TIME_TOL, "absolute")


def _sampling(case: dict[str, Any]) -> SamplingConfig:
    if "ode" in case:
        solver, steps = _ODE[case["ode"]["sampling_method"]]
        steps = steps or case["ode"]["num_steps"] - 1
        return SamplingConfig(solver=solver, num_steps=steps, reverse=case["ode"].get("reverse", False))
    sde, last = case["sde"], case["sde"]["last_step"]
    steps = sde["num_steps"] - (last is None)
    ends = {"last_step": "none"} if last is None else {"last_step": last.lower(), "last_size": sde["last_step_size"]}
    noise = {"diffusion": sde["diffusion_form"].lower(), "diffusion_norm": sde["diffusion_norm"]}
    return SamplingConfig(solver=_SDE[sde["sampling_method"]], num_steps=steps, **noise, **ends)


def judge_infinite_noise(golden: Golden) -> None:
    """Where the official code goes on with NaN, dgfast ends with a sentence."""
    w = diffusion("sbdm", 1.0, torch.zeros(1, dtype=torch.float64), PATHS["linear"])
    golden.judge("nan_sbdm", not bool(w.isfinite()), PATH_TOL)
    with pytest.raises(UserError, match="sbdm is infinite"):
        Sampler(Networks(flow_net(golden)), SamplingConfig(solver="flow-sde", diffusion="sbdm"))
