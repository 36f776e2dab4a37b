"""The judges of the official samplers of EDM, DG and ADM, and of their noise levels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import noise_levels as nl
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.guidance import OUTSIDE_WINDOW, ClassifierGuidance, DiscriminatorGuidance
from dgfast.guidance.gradient import denoiser_gate
from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from dgfast.solvers import ddim, ddpm
from tests.support.golden import ADM_FRACTION, NET_TOL, SAMPLER_TOL, SIGMA_TOL, VE_SCHEDULE_TOL, Golden
from tests.support.golden_networks import level_tol


class Recorder:
    """A denoiser that keeps the noise levels it is asked for and hands everything else on."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        self.sigmas.append(sigma.clone())
        return self.net(x, sigma, class_labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)


# Samplers -------------------------------------------------------------------------------------------------------------
def judge_edm_sampler(golden: Golden) -> None:
    latents, noises = golden.tensor("latents"), golden.tensor("noises")
    for tag, case in golden.meta["cases"].items():
        recorder = Recorder(golden.filled_net(case["net_class"], case["net_config"], case["prefix"]))
        config = SamplingConfig(**case["kwargs"])
        states: list[Tensor] = []
        sampler = Sampler(Networks(recorder), config)
        x = sampler.integrate(
            latents,
            golden.labels() if recorder.label_dim else None,
            iter(noises).__next__,
            lambda _, x, *rest, states=states: states.append(x),
        )
        # The reference itself moves by 3e-4 there: sigma = sqrt(t) on a grid made for another schedule.
        loose = config.solver == "heun" and config.schedule == "ve" and config.discretization != "ve"
        tol = VE_SCHEDULE_TOL if loose else SAMPLER_TOL
        golden.judge(f"{tag}/x", x, tol)
        sigmas = torch.stack([one_level(sigma) for sigma in recorder.sigmas])
        golden.judge(f"{tag}/sigma_calls", sigmas, level_tol(recorder.net, config.discretization), "relative")
        golden.judge_all(f"{tag}/x_steps", torch.stack([sampler.first_state(latents), *states[:-1]]), tol)


def judge_dg_sampler(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    options = golden.meta["dg_kwargs"]
    recorder = Recorder(golden.net("EDMPrecond", "net_config", "prefix_net"))
    latents = golden.tensor("latents")
    none = torch.zeros_like(latents), torch.full((len(latents),), OUTSIDE_WINDOW)  # outside the window nothing is asked
    guidances: dict[int, tuple[Tensor, Tensor]] = {}
    correct = DiscriminatorGuidance.correct

    def recording(self: DiscriminatorGuidance, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        direction, gate, log_ratio = correct(self, *arguments)
        weight = self.weight * torch.where(
            log_ratio < 0, self.boost or 1.0, 1.0
        )  # DG recorded it without weight and boost
        guidances[len(recorder.sigmas) - 1] = -(gate / weight).view(-1, 1, 1, 1) * direction, log_ratio
        return direction, gate, log_ratio

    monkeypatch.setattr(DiscriminatorGuidance, "correct", recording)
    sampler = Sampler(
        Networks(recorder, discriminator=golden.discriminator()),
        SamplingConfig(**golden.meta["sampler_kwargs"]),
        GuidanceConfig(
            dg_weight=options["dg_weight_1st_order"],
            dg_weight_2nd=options["dg_weight_2nd_order"],
            dg_window=(options["time_min"], options["time_max"]),
            boosting=bool(options["boosting"]),
            published_window=options["dg_weight_1st_order"] > 0,
        ),
    )
    # In the steps that the file leaves out, the official code multiplied its noise by zero.
    noises = torch.zeros(len(sampler.steps), *latents.shape, dtype=torch.float64)
    if "noises" in golden.arrays:
        noises[golden.tensor("noise_steps")] = golden.tensor("noises").double()
    states: list[Tensor] = []
    x = sampler.integrate(latents, golden.labels(), iter(noises).__next__, lambda _, x, *rest: states.append(x))

    golden.judge("x", x, SAMPLER_TOL)
    golden.judge_all("x_steps", torch.stack([sampler.first_state(latents), *states[:-1]]), SAMPLER_TOL)
    golden.judge("t_hat", torch.stack(recorder.sigmas[0::2]), SIGMA_TOL, "relative")
    golden.judge("t_next", torch.stack([one_level(s) for s in recorder.sigmas[1::2]]), SIGMA_TOL, "relative")
    for name, calls in (("", range(0, len(recorder.sigmas), 2)), ("2", range(1, len(recorder.sigmas), 2))):
        gradients, log_ratios = (
            torch.stack(column) for column in zip(*(guidances.get(k, none) for k in calls), strict=True)
        )
        golden.judge_all(f"guidance{name}", gradients, SAMPLER_TOL)
        if f"log_ratio{name}" in golden.arrays:
            golden.judge_log_ratio(f"log_ratio{name}", log_ratios, SAMPLER_TOL)


def one_level(sigma: Tensor) -> Tensor:
    assert (sigma == sigma[0]).all(), f"one noise level for the whole batch expected, not {sigma.tolist()}"
    return sigma[0]


# Noise levels ---------------------------------------------------------------------------------------------------------
def judge_vpsde(golden: Golden) -> None:
    u = golden.tensor("u")
    for suffix, dtype, tol in (("", torch.float64, 1e-10), ("_f32", torch.float32, 1e-5)):
        sigma, t = golden.tensor("sigma").to(dtype), golden.tensor("t_lin").to(dtype)
        of_t, of_tau = nl.vp_sigma(t), nl.vp_sigma(golden.tensor(f"tau{suffix}"))  # their tau, where float32 cancels
        outputs = {
            "tau": nl.vp_time(sigma),
            "mean": nl.vp_alpha(of_tau),
            "std": of_tau * nl.vp_alpha(of_tau),
            "tcos_of_tau": nl.cosine_time(sigma),
            "tcos_of_t_lin": nl.cosine_time(of_t),
            "integral_beta": (of_t**2).log1p(),
            "antiderivative": 2 * of_t.log(),  # of g^2 / sigma_vp^2, the density that DG draws training times from
        }
        for key, mine in outputs.items():
            if key + suffix in golden.arrays:
                cancels = key + suffix == "antiderivative_f32"
                golden.judge(key + suffix, mine, 5e-4 if cancels else tol, "absolute" if cancels else "std")
    for key in golden.arrays:
        rule, _, tau_min = key.rpartition("_")
        if rule == "train_t_importance":
            golden.judge(key, nl.vp_time(nl.log_uniform_sigma(u, float(tau_min))), 5e-4, "absolute")
        elif rule == "train_t_uniform":  # dgfast never draws these; they judge its maps as each other's inverse
            t = float(tau_min) + u.double() * (1 - float(tau_min))
            golden.judge(key, nl.vp_time(nl.vp_sigma(t)), 5e-4, "absolute")
        elif rule == "train_Z":
            ends = nl.log_uniform_sigma(torch.tensor([0.0, 1.0]), float(tau_min))
            golden.judge(key, 2 * ends.log().diff()[0], 1e-3, "relative")


# ADM ------------------------------------------------------------------------------------------------------------------
def judge_adm(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADM's score network, its classifier with input gradient, and its two sampling loops."""
    net = golden.net(
        "create_model", "model_config", "prefix_model", "state_dict" if "state_dict" in golden.meta else None
    )
    classifier_names = "state_dict_classifier" if "state_dict_classifier" in golden.meta else None
    classifier = golden.net("EncoderUNetModel", "classifier_config", "prefix_classifier", classifier_names)
    labels = golden.tensor("y")
    if "cases" in golden.meta:
        for tag in golden.meta["cases"]:
            judge_adm_loop(golden, tag, net, classifier, monkeypatch)
        return
    x, y = golden.tensor("x"), labels if golden.meta["model_config"]["class_cond"] else None
    if golden.wants("model_out"):
        golden.judge_all("model_out", torch.stack([net(x, t, y) for t in golden.tensor("t")]), NET_TOL)
    if golden.wants("model_out_float_t"):
        golden.judge_all("model_out_float_t", net(x, golden.tensor("t")[0] + ADM_FRACTION, y), NET_TOL)
    if not golden.wants("classifier_logits"):
        return
    logits, gradients = [], []
    for t in golden.tensor("t"):
        with torch.enable_grad():
            xc = golden.tensor("xc").clone().requires_grad_()
            logits.append(classifier(xc, t))
            log_probability = F.log_softmax(logits[-1], dim=-1).gather(1, labels[:, None]).sum()
            gradients.append(torch.autograd.grad(log_probability, xc)[0])
    golden.judge_all("classifier_logits", torch.stack(logits).detach(), NET_TOL)
    golden.judge_all("cond_fn", golden.tensor("scale") * torch.stack(gradients), NET_TOL)


def judge_adm_loop(
    golden: Golden, tag: str, raw: nn.Module, encoder: EncoderUNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = golden.meta["cases"][tag], golden.meta["model_config"]
    options = case["create_gaussian_diffusion"]
    net = DDPMPrecond(
        raw, model["image_size"], 3, 1000 if model["class_cond"] else 0,
        noise_schedule=options["noise_schedule"], steps=options["steps"], learn_sigma=options["learn_sigma"],
        predict_xstart=options["predict_xstart"], rescale_timesteps=options["rescale_timesteps"],
    )  # fmt: skip
    sampling = SamplingConfig(
        solver="ddpm" if case["loop"] == "p_sample_loop" else "ddim",
        respacing=options["timestep_respacing"],
        clip_denoised=case["clip_denoised"],
        eta=case["eta"],
        fixed_variance="small" if options["sigma_small"] else "large",
    )
    scale = case["classifier_scale"]
    networks = Networks(net, classifier=NoisyClassifier(encoder), time=net.time)
    denoised: list[Tensor] = []
    norms: list[Tensor] = []
    times: list[Tensor] = []
    correct = ClassifierGuidance.correct

    def recording(self: ClassifierGuidance, x: Tensor, sigma: Tensor, *rest: Any) -> Any:
        direction, gate, nothing = correct(self, x, sigma, *rest)
        weight = (gate / denoiser_gate(sigma)).view(-1, 1, 1, 1)
        norms.append((weight * direction).flatten(1).norm(dim=1))
        times.append(one_level(net.timesteps(sigma)))
        return direction, gate, nothing

    def keeping(step: Callable[..., Any], x: Tensor, d: Tensor, *rest: Any) -> Any:
        denoised.append(d)
        return step(x, d, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierGuidance, "correct", recording)
        for module, step in ((ddpm, "ancestral_step"), (ddim, "ddim_step")):
            patch.setattr(module, step, partial(keeping, getattr(module, step)))
        sampler = Sampler(networks, sampling, GuidanceConfig(classifier_scale=scale))
        sigmas = torch.tensor([step.sigma for step in sampler.steps], dtype=torch.float64)
        states: list[Tensor] = []
        x = sampler.integrate(
            golden.tensor("x_T"),
            F.one_hot(golden.tensor("y"), 1000).float(),
            iter(golden.tensor("noises").double()).__next__,
            lambda _, x, *rest: states.append(x),
        )
    alphas = nl.vp_alpha(torch.cat([sigmas[1:], torch.zeros(1)]))
    after = torch.stack(states) * alphas[:, None, None, None, None]
    golden.judged.add(f"{tag}/steps")  # says which of them the file keeps
    recorded = golden.tensor(f"{tag}/steps")
    bounds = nl.posterior_log_variances(sigmas).flip(0)
    golden.judge(f"{tag}/x", x, SAMPLER_TOL)
    golden.judge_all(f"{tag}/x_steps", after[recorded], SAMPLER_TOL)
    golden.judge_all(f"{tag}/pred_xstart", torch.stack(denoised)[recorded], SAMPLER_TOL)
    kept = torch.tensor(nl.respaced_timesteps(options["timestep_respacing"], options["steps"]))
    golden.judge(f"{tag}/timestep_map", kept, SAMPLER_TOL)
    golden.judge(f"{tag}/betas", bounds[:, 1].exp(), 1e-9, "relative")
    golden.judge(f"{tag}/posterior_log_variance_clipped", bounds[:, 0], 1e-9, "relative")
    if f"{tag}/cond_norm" in golden.arrays:
        golden.judge(f"{tag}/cond_norm", torch.stack(norms), SAMPLER_TOL)
        golden.judge(f"{tag}/t_seen", torch.stack(times), SIGMA_TOL, "absolute")
