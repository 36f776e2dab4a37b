"""Every number that the official implementations left in the golden folder.

The files say themselves what they hold: the network to build, the cases to run, the outputs to judge. A further file of
a known kind needs no change here, and an output that no line below judges is a failure.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import nets
from dgfast import noise_levels as nl
from dgfast import sampler as sampler_module
from dgfast.bundle import load_state
from dgfast.checkpoints import nvidia_pickle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.guidance import OUTSIDE_WINDOW, ClassifierFreeGuidance, ClassifierGuidance, DiscriminatorGuidance
from dgfast.guidance.gradient import denoiser_gate
from dgfast.nets.discriminator import Discriminator, NoisyClassifier
from dgfast.networks import Networks
from dgfast.sampler import Sampler

# Tolerances of the folder's README: times the standard deviation of the reference, of each call or step on its own.
NET_TOL, UNCONDITIONAL_GRADIENT_TOL, SAMPLER_TOL, VE_SCHEDULE_TOL = 2e-4, 4e-4, 5e-4, 1e-2
DIT_SAMPLER_TOL = 2e-3
SIGMA_TOL = 1e-6  # noise levels are a formula, not a network; judged relative to each of them, small ones too
TABLE_TOL = 1e-3  # iDDPM's are a table that the official code sums in float32; neighbours lie 3e-3 apart and more
_NO_LABEL_SIGMA = 0.5  # at which the pickle's network was called without labels; the file does not say, its values do
_ADM_FRACTION = 0.25  # added to the first timesteps where ADM's network was called with fractions; ditto
INPUTS_AMONG_OUTPUTS = {"t_vec", "grid_sigma", "grid_t"}  # some files list them there

NetFactory = Callable[..., nn.Module]


def correction_of(guidance: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the guidance adds to the denoised images, and its log-ratio."""
    direction, gate, log_ratio = guidance.correct(*arguments)
    return gate.view(-1, 1, 1, 1) * direction, log_ratio


class Golden:
    """One file, and a record of which of its outputs were judged and how."""

    def __init__(self, path: Path, filled_net: NetFactory) -> None:
        with np.load(path) as stored:
            self.arrays = {key: stored[key] for key in stored.files}
        self.path, self.filled_net = path, filled_net
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.judged: set[str] = set()
        self.failures: list[str] = []
        self.ratio = self.relative = 0.0

    def tensor(self, key: str) -> Tensor:
        """An input."""
        self.judged |= {key} & INPUTS_AMONG_OUTPUTS
        return torch.from_numpy(self.arrays[key])

    def labels(self) -> Tensor | None:
        return self.tensor("class_labels") if "class_labels" in self.arrays else None

    def net(self, kind: str, config: str, prefix: str, state_dict: str | None = None) -> nn.Module:
        """The network of those entries of `meta`, its state dict compared with the official one."""
        net = self.filled_net(kind, self.meta[config], self.meta[prefix])
        if state_dict is not None:
            mine = {name: list(value.shape) for name, value in net.state_dict().items()}
            official = self.meta[state_dict]
            wrong = [name for name in mine.keys() | official.keys() if mine.get(name) != official.get(name)]
            self.failures += [f"{state_dict}: {', '.join(sorted(wrong))}"] if wrong else []
        return net

    def discriminator(self) -> Discriminator:
        return Discriminator(
            self.net("create_classifier", "classifier", "prefix_classifier"),
            self.net("create_classifier", "discriminator", "prefix_discriminator"),
        )

    def wants(self, base: str) -> bool:
        """Whether the file records `base`, or a part or a summary of it."""
        return any(base + suffix in self.arrays for suffix in ("", *_SUMMARIES))

    def judge(self, key: str, mine: Tensor | float, tol: float, how: str = "std") -> None:
        """Compare one output; `how` says what `tol` is a share of: "std", "relative" to each number, or "absolute"."""
        self.judged.add(key)
        reference = self.arrays[key]
        ours = np.asarray(mine)
        if ours.shape != reference.shape:
            self.failures.append(f"{key}: shape {ours.shape}, not {reference.shape}")
            return
        if np.issubdtype(reference.dtype, np.integer):
            self._record(key, 0.0 if np.array_equal(ours, reference) else np.inf, tol)
            return
        ours, reference = ours.astype(np.float64), reference.astype(np.float64)
        stacked = reference.ndim >= 4
        for a, b in zip(ours, reference, strict=True) if stacked else [(ours, reference)]:
            self._record(key, _error(a, b, how), tol)

    def judge_all(self, base: str, mine: Tensor, tol: float) -> None:
        """Compare whatever the file records of `base`: all of it, every n-th entry, means, deviations, norms."""
        for suffix, summary in (("", lambda full, _: full), *_SUMMARIES.items()):
            if base + suffix in self.arrays:
                self.judge(base + suffix, summary(mine, self.arrays[base + suffix].shape), tol)

    def judge_log_ratio(self, key: str, mine: Tensor, tol: float) -> None:
        """As `judge`, but samples outside the window must be marked exactly, and do not count for the spread."""
        outside = self.arrays[key] == OUTSIDE_WINDOW
        if not np.array_equal(mine.numpy() == OUTSIDE_WINDOW, outside):
            self.failures.append(f"{key}: {mine.tolist()} is outside the window at other places than the reference")
        self.arrays[key] = self.arrays[key][~outside]
        self.judge(key, mine[torch.from_numpy(~outside)], tol)

    def _record(self, key: str, error: float, tol: float) -> None:
        error = np.inf if np.isnan(error) else error
        self.ratio, self.relative = max(self.ratio, error / tol), max(self.relative, error)
        if error > tol:
            self.failures.append(f"{key}: error {error:.3g}, tolerance {tol:.3g}")


def _error(mine: np.ndarray, reference: np.ndarray, how: str) -> float:
    difference = np.abs(mine - reference)
    if how == "absolute" or not difference.any():
        return float(difference.max(initial=0.0))
    if how == "relative":
        differs = difference != 0
        return float((difference[differs] / np.abs(reference[differs])).max()) if reference[differs].all() else np.inf
    # A single number has no spread, and a guidance of zeros must be zeros.
    scale = reference.std() or np.abs(reference).max()
    return float(difference.max() / scale) if scale else np.inf


def _every_nth(full: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the file keeps of a large array: its shape tells the stride along each axis."""
    return full[tuple(slice(None, None, -(-whole // kept)) for whole, kept in zip(full.shape, shape, strict=True))]


def _over_trailing(reduce: Callable[..., Tensor]) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    return lambda full, shape: reduce(full.double(), dim=tuple(range(len(shape), full.ndim)))


_SUMMARIES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "_sub": _every_nth,
    "_mean": _over_trailing(torch.mean),
    "_std": _over_trailing(lambda full, dim: full.std(dim=dim, correction=0)),
    "_norm": _over_trailing(lambda full, dim: full.square().sum(dim=dim).sqrt()),
}


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


# Denoisers ------------------------------------------------------------------------------------------------------------
def judge_denoiser(golden: Golden) -> None:
    net = golden.net(golden.meta["cls"], "config", "prefix", "state_dict")
    x_base, labels = golden.tensor("x_base"), golden.labels()
    augment = golden.tensor("augment_labels") if "augment_labels" in golden.arrays else None
    calls = {"D": list(zip(golden.tensor("x_scale"), golden.tensor("sigma"), strict=True))}
    if "sigma_vec" in golden.arrays:
        calls["D_vec"] = [(golden.tensor("x_scale_vec")[:, None, None, None], golden.tensor("sigma_vec"))]
    for base, inputs in calls.items():
        for suffix, conditions in (("", (labels,)), ("_nolabel", ()), ("_augment", (labels, augment))):
            if golden.wants(base + suffix):
                outputs = [net(scale * x_base, sigma, *conditions) for scale, sigma in inputs]
                golden.judge_all(base + suffix, torch.stack(outputs) if base == "D" else outputs[0], NET_TOL)
    judge_noise_levels_of_net(golden, net)


def level_tol(net: nn.Module, discretization: str = "edm") -> float:
    return TABLE_TOL if discretization == "iddpm" or hasattr(net, "u") else SIGMA_TOL


def judge_noise_levels_of_net(golden: Golden, net: nn.Module) -> None:
    has = golden.arrays.__contains__
    tol = level_tol(net)
    for key in filter(has, ("sigma_min", "sigma_max")):
        golden.judge(key, getattr(net, key), tol, "relative")
    if has("u"):
        golden.judge("u", net.u, tol, "relative")
    if has("grid_sigma"):
        grid = golden.tensor("grid_sigma")
        rounded = net.round_sigma(grid)
        golden.judge("round_sigma", rounded, tol, "relative")
        if has("round_sigma_index"):
            golden.judge("round_sigma_index", (rounded[:, None] == net.u).int().argmax(dim=1), tol)
        if has("round_sigma_0d"):  # recorded without its input, which is the level of the grid that rounds to it
            (place,) = np.nonzero(golden.arrays["round_sigma"] == golden.arrays["round_sigma_0d"])
            golden.judge("round_sigma_0d", net.round_sigma(grid[place[0]]), tol, "relative")
        if has("sigma_inv"):
            golden.judge("sigma_inv", net.sigma_inv(grid), SIGMA_TOL, "relative")
        if has("sigma_inv_f32"):
            golden.judge("sigma_inv_f32", net.sigma_inv(grid.float()), SIGMA_TOL)
    if has("grid_t"):
        golden.judge("sigma_of_t", net.sigma(golden.tensor("grid_t")), SIGMA_TOL, "relative")


# Classifiers and discriminators ---------------------------------------------------------------------------------------
def judge_classifier(golden: Golden) -> None:
    encoder = golden.net("create_classifier", "config", "prefix", "state_dict")
    classifier, x = NoisyClassifier(encoder), golden.tensor("x")
    times = [t.expand(len(x)) for t in golden.tensor("t")]
    golden.judge_all("logits", torch.stack([classifier(x, t) for t in times]), NET_TOL)
    golden.judge_all("feature", torch.stack([encoder.features(x, 999 * t) for t in times]), NET_TOL)
    if "t_vec" in golden.arrays:
        t_vec = golden.tensor("t_vec")
        golden.judge_all("feature_vec", encoder.features(x, 999 * t_vec), NET_TOL)
        if golden.wants("logits_vec"):
            golden.judge_all("logits_vec", classifier(x, t_vec), NET_TOL)


class GivenFeatures(nn.Module):
    """Stands for the trunk where a file gives the feature map itself."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(features)
        self.feature_channels, self.feature_size = features.shape[1], features.shape[-1]

    def features(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.given


def judge_discriminator(golden: Golden, golden_fill: ModuleType) -> None:
    match = re.search(r'draw16\("([^"]+)", \(([\d, ]+)\)\)', golden.meta["note"])
    assert match, f"{golden.path.name}: its note does not say how to draw the feature map"
    features = torch.from_numpy(golden_fill.draw16(match[1], [int(n) for n in match[2].split(",")])).float()
    t, labels = golden.tensor("t"), golden.tensor("labels")
    images = torch.zeros(len(features), 3, 8, 8)  # what the trunk would read
    for config in [key for key in golden.meta if key.startswith("config_")]:
        name = config.removeprefix("config_")
        state_dict = f"state_dict_{name}" if f"state_dict_{name}" in golden.meta else "state_dict"
        head = golden.net("create_classifier", config, f"prefix_{name}", state_dict)
        discriminator = Discriminator(GivenFeatures(features), head)
        one_hot = F.one_hot(labels, int(labels.max()) + 1).float()
        outputs = {
            f"{name}_logit": head(features, 999 * t, labels),
            f"{name}_logit_onehot": discriminator(images, t, one_hot)[:, None],
            f"{name}_logit_label0": discriminator(images, t)[:, None],
        }
        outputs[f"{name}_prob"] = outputs[f"{name}_logit"].sigmoid()
        for key in golden.arrays.keys() & outputs.keys():
            golden.judge(key, outputs[key], NET_TOL)


# Gradients ------------------------------------------------------------------------------------------------------------
def gradient_guidance(golden: Golden, published_window: bool) -> DiscriminatorGuidance:
    meta = golden.meta
    time = nl.cosine_time if meta["resolution"] == 64 else nl.vp_time  # DG's code chooses by the resolution as well
    window = meta["time_min"], meta["time_max"]
    return DiscriminatorGuidance(golden.discriminator(), 1.0, window, time, published_window)


def gradient_calls(golden: Golden) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(prefix of the outputs, x, sigma [B]) of every call; the calls with one sigma for all come first, without one."""
    x_base = golden.tensor("x_base")
    for scale, sigma in zip(golden.tensor("x_scale"), golden.tensor("sigma"), strict=True):
        yield "", scale * x_base, sigma.expand(len(x_base))
    for j, sigma in enumerate(golden.tensor("sigma_vec") if "sigma_vec" in golden.arrays else []):
        yield f"vec{j}_", sigma[:, None, None, None] * x_base, sigma


def gradient_tol(golden: Golden) -> float:
    return NET_TOL if golden.meta["condition"] else UNCONDITIONAL_GRADIENT_TOL


def judge_gradient(golden: Golden) -> None:
    guidance, labels, tol = gradient_guidance(golden, published_window=True), golden.labels(), gradient_tol(golden)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for prefix, x, sigma in gradient_calls(golden):
        correction, log_ratio = correction_of(guidance, x, sigma, labels, x)
        found.setdefault(prefix, []).append((-correction, log_ratio))  # DG subtracts its guidance, dgfast adds
    for prefix, results in found.items():
        gradients, log_ratios = (torch.stack(column) for column in zip(*results, strict=True))
        golden.judge_all(f"{prefix}guidance", gradients if prefix == "" else gradients[0], tol)
        golden.judge_log_ratio(f"{prefix}log_ratio", log_ratios if prefix == "" else log_ratios[0], tol)


# Samplers -------------------------------------------------------------------------------------------------------------
def judge_edm_sampler(golden: Golden) -> None:
    latents, noises = golden.tensor("latents"), golden.tensor("noises")
    for tag, case in golden.meta["cases"].items():
        recorder = Recorder(golden.filled_net(case["net_class"], case["net_config"], case["prefix"]))
        config = SamplingConfig(**case["kwargs"])
        states: list[Tensor] = []
        x = Sampler(Networks(recorder), config).integrate(
            latents,
            golden.labels() if recorder.label_dim else None,
            iter(noises).__next__,
            lambda _, x, states=states: states.append(x),
        )
        # The reference itself moves by 3e-4 there: sigma = sqrt(t) on a grid made for another schedule.
        loose = config.solver == "heun" and config.schedule == "ve" and config.discretization != "ve"
        tol = VE_SCHEDULE_TOL if loose else SAMPLER_TOL
        golden.judge(f"{tag}/x", x, tol)
        sigmas = torch.stack([_one_level(sigma) for sigma in recorder.sigmas])
        golden.judge(f"{tag}/sigma_calls", sigmas, level_tol(recorder.net, config.discretization), "relative")
        golden.judge_all(f"{tag}/x_steps", torch.stack(states), tol)


def judge_dg_sampler(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    options = golden.meta["dg_kwargs"]
    recorder = Recorder(golden.net("EDMPrecond", "net_config", "prefix_net"))
    latents = golden.tensor("latents")
    none = torch.zeros_like(latents), torch.full((len(latents),), OUTSIDE_WINDOW)  # outside the window nothing is asked
    guidances: dict[int, tuple[Tensor, Tensor]] = {}
    correct = DiscriminatorGuidance.correct

    def recording(self: DiscriminatorGuidance, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        direction, gate, log_ratio = correct(self, *arguments)
        weight = self.weight * torch.where(log_ratio < 0, self.boost, 1.0)  # DG recorded it without weight and boost
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
            published_window=True,
        ),
    )
    # In the steps that the file leaves out, the official code multiplied its noise by zero.
    noises = torch.zeros(len(sampler.steps), *latents.shape, dtype=torch.float64)
    if "noises" in golden.arrays:
        noises[golden.tensor("noise_steps")] = golden.tensor("noises").double()
    states: list[Tensor] = []
    x = sampler.integrate(latents, golden.labels(), iter(noises).__next__, lambda _, x: states.append(x))

    golden.judge("x", x, SAMPLER_TOL)
    golden.judge_all("x_steps", torch.stack(states), SAMPLER_TOL)
    golden.judge("t_hat", torch.stack(recorder.sigmas[0::2]), SIGMA_TOL, "relative")
    golden.judge("t_next", torch.stack([_one_level(s) for s in recorder.sigmas[1::2]]), SIGMA_TOL, "relative")
    for name, calls in (("", range(0, len(recorder.sigmas), 2)), ("2", range(1, len(recorder.sigmas), 2))):
        gradients, log_ratios = (
            torch.stack(column) for column in zip(*(guidances.get(k, none) for k in calls), strict=True)
        )
        golden.judge_all(f"guidance{name}", gradients, SAMPLER_TOL)
        if f"log_ratio{name}" in golden.arrays:
            golden.judge_log_ratio(f"log_ratio{name}", log_ratios, SAMPLER_TOL)


def _one_level(sigma: Tensor) -> Tensor:
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
        golden.judge_all("model_out_float_t", net(x, golden.tensor("t")[0] + _ADM_FRACTION, y), NET_TOL)
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
    golden: Golden, tag: str, raw: nn.Module, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
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
        times.append(_one_level(net.timesteps(sigma)))
        return direction, gate, nothing

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierGuidance, "correct", recording)
        for step in ("ancestral_step", "ddim_step"):
            real = getattr(sampler_module, step)
            patch.setattr(sampler_module, step, lambda x, d, *rest, real=real: denoised.append(d) or real(x, d, *rest))
        sampler = Sampler(networks, sampling, GuidanceConfig(classifier_scale=scale))
        sigmas = torch.tensor([step.sigma for step in sampler.steps], dtype=torch.float64)
        states: list[Tensor] = []
        x = sampler.integrate(
            golden.tensor("x_T"),
            F.one_hot(golden.tensor("y"), 1000).float(),
            iter(golden.tensor("noises").double()).__next__,
            lambda _, x: states.append(x),
        )
    after = (
        torch.stack([*states[1:], x]) * nl.vp_alpha(torch.cat([sigmas[1:], torch.zeros(1)]))[:, None, None, None, None]
    )
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


# DiT ------------------------------------------------------------------------------------------------------------------
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
    golden.judge_all("pos_embed_init", nets.build("DiT", **golden.meta["config"]).pos_embed[0], NET_TOL)
    golden.judge("out", _kept(golden, "out", torch.stack([net(x, t, y) for t in times])), NET_TOL)
    golden.judge("out_null", _kept(golden, "out_null", net(x, times[1], null)), NET_TOL)
    branch = int(golden.tensor("branch_time"))
    two = {"scale": float(golden.tensor("LT_cfg")), "scale_low": float(golden.tensor("ST_cfg")), "branch": branch}
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
    return _every_nth(full, golden.arrays[key].shape)


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
    step, correct = sampler_module.ancestral_step, DiscriminatorGuidance.correct

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
        patch.setattr(sampler_module, "ancestral_step", stepping)
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
        outputs = [raw((alpha * first).float(), net.timesteps(sigma), labels) for labels in (y, y * 0 + raw.null_class)]
        noise_seen, v = dit_doubled(*outputs, raw.in_channels, sigma, **scales)[len(y) :].double().chunk(2, dim=1)
        denoised = second - t * noise_seen
        variance = (bound[0] + (v + 1) / 2 * (bound[1] - bound[0])).exp()
        shift = variance * gradients.get(float(sigma[0]), torch.zeros(()))
        clipped = denoised.clamp(-1, 1) if case["clip_denoised"] else denoised
        second = step(second, clipped, shift, variance, t, t_next, noise)
    golden.judge_all(f"{tag}/x_second_half", second, DIT_SAMPLER_TOL)


# Elsewhere ------------------------------------------------------------------------------------------------------------
def judge_pickle(golden: Golden) -> None:
    """The network in the pickle beside the file, read without running any of it."""
    pickle = golden.path.with_name(golden.path.stem.removesuffix("_expected") + ".pkl")
    assert pickle.is_file(), f"{golden.path.name} belongs to {pickle.name}, which is not there"
    snapshot = nvidia_pickle.read(pickle)
    net = nets.build(snapshot.kind, **snapshot.keywords).eval().requires_grad_(False)
    load_state(net, snapshot.tensors, pickle)
    recipe = golden.net(snapshot.kind, "config", "prefix").state_dict()
    wrong = [name for name, value in net.state_dict().items() if not torch.equal(value, recipe[name])]
    golden.failures += [f"weights: {', '.join(wrong)}"] if wrong else []
    x, sigma, labels = golden.tensor("x_base"), golden.tensor("sigma"), golden.labels()
    if "D" in golden.arrays:
        calls = zip(golden.tensor("x_scale"), sigma, strict=True)
        golden.judge("D", torch.stack([net(scale * x, level, labels) for scale, level in calls]), NET_TOL)
    if "D_nolabel" in golden.arrays:
        golden.judge("D_nolabel", net(x, torch.tensor(_NO_LABEL_SIGMA), None), NET_TOL)


def kind_of(meta: dict[str, Any]) -> str:
    source = meta.get("source", "")
    if "pickle" in source:
        return "pickle"
    if source.startswith("openai/guided-diffusion"):
        return "adm"
    if source.startswith("alsdudrla10/DG_imagenet"):
        return "dit"
    if "vpsde" in source:
        return "vpsde"
    if meta.keys() >= {"cls", "config"}:
        return "denoiser"
    if "classifier_width" in meta.get("config", {}):
        return "classifier"
    if any(key.startswith("config_") for key in meta):
        return "discriminator"
    if "dg_kwargs" in meta:
        return "dg sampler"
    if meta.keys() >= {"time_min", "prefix_classifier", "prefix_discriminator"}:
        return "gradient"
    if "cases" in meta and all("function" in case for case in meta["cases"].values()):
        return "edm sampler"
    return "unknown"


@torch.no_grad()
def test_golden_outputs_agree_with_the_official_code(
    golden_path: Path,
    filled_net: NetFactory,
    golden_fill: ModuleType,
    golden_report: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = Golden(golden_path, filled_net)
    judges: dict[str, Callable[[], None]] = {
        "denoiser": lambda: judge_denoiser(golden),
        "classifier": lambda: judge_classifier(golden),
        "discriminator": lambda: judge_discriminator(golden, golden_fill),
        "gradient": lambda: judge_gradient(golden),
        "edm sampler": lambda: judge_edm_sampler(golden),
        "dg sampler": lambda: judge_dg_sampler(golden, monkeypatch),
        "vpsde": lambda: judge_vpsde(golden),
        "adm": lambda: judge_adm(golden, monkeypatch),
        "dit": lambda: judge_dit(golden, monkeypatch),
        "pickle": lambda: judge_pickle(golden),
    }
    kind = kind_of(golden.meta)
    assert kind in judges, f"{golden_path.name}: unknown kind of golden file, meta has {sorted(golden.meta)}"
    judges[kind]()
    outputs = set(golden.meta["outputs"])
    assert outputs, f"{golden_path.name} lists no outputs"
    missing, judged = outputs - golden.judged, len(outputs & golden.judged)
    golden_report(golden_path.stem, judged, golden.ratio, golden.relative)
    assert not golden.failures, f"{golden_path.name}:\n" + "\n".join(golden.failures)
    assert not missing, f"{golden_path.name}: nothing judges {', '.join(sorted(missing))}"


@torch.no_grad()
def test_golden_default_window_judges_each_sample_on_its_own(golden_folder: Path, filled_net: NetFactory) -> None:
    """DG judges the window by the smallest tau of the batch; by default, dgfast judges each sample by its own."""
    judged = 0
    own = Path(__file__).parent / "golden"  # this law of dgfast holds whatever files another folder has
    for path in sorted({*golden_folder.glob("*.npz"), *own.glob("dg_grad*.npz")}):
        golden = Golden(path, filled_net)
        if kind_of(golden.meta) != "gradient":
            continue
        guidance, labels, tol = gradient_guidance(golden, published_window=False), golden.labels(), gradient_tol(golden)
        low, high = guidance.window
        for prefix, x, sigma in gradient_calls(golden):
            if prefix == "":
                continue  # one tau for the whole batch: both windows are the same condition
            correction, log_ratio = correction_of(guidance, x, sigma, labels, x)
            tau = nl.vp_time(sigma)
            for b in range(len(x)):
                one, where = slice(b, b + 1), f"{path.stem}, {prefix}, sample {b}"
                if not low <= tau[b] <= high:
                    assert not correction[b].any() and log_ratio[b] == OUTSIDE_WINDOW, where
                    continue
                if low <= tau.min() <= high:  # then the published code guides this sample too
                    name = "guidance" if f"{prefix}guidance" in golden.arrays else "guidance_sub"
                    wanted = -torch.from_numpy(golden.arrays[prefix + name][one])
                    ratio = float(golden.arrays[f"{prefix}log_ratio"][b])
                else:
                    alone = None if labels is None else labels[one]
                    wanted, ratio = correction_of(guidance, x[one], sigma[one], alone, x[one])
                mine = _every_nth(correction[one], wanted.shape)
                assert wanted.std() > 0 and (mine - wanted).abs().max() <= tol * wanted.std(), where
                assert log_ratio[b].item() == pytest.approx(float(ratio), abs=1e-3), where
                judged += 1
    assert judged, "no file has a call with one noise level a sample"
