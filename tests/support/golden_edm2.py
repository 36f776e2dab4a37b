"""The judges of EDM2's sampler, encoders and averages over training."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgfast.checkpoints import phema
from dgfast.checkpoints.defaults import EDM2_VAE
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.latents import VaeSpec
from dgfast.networks import Networks
from dgfast.outputs import as_pixels
from dgfast.sampler import Sampler
from dgfast.training.data import ImageSet
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


# Encoders -------------------------------------------------------------------------------------------------------------
def judge_encoders(golden: Golden) -> None:
    pixels, latents = golden.tensor("pixels"), golden.tensor("latents")
    spec = EDM2_VAE
    assert spec.source == golden.meta["vae_name"]
    golden.judge("vae_scale", torch.tensor(spec.scale), 1e-6)
    golden.judge("vae_bias", torch.tensor(spec.bias), 1e-6)
    images = ImageSet(pixels.permute(0, 2, 3, 1).numpy(), np.zeros(len(pixels), dtype=np.int64)).tensors()[0]
    golden.judge("rgb_latents", images, 1e-6)
    golden.judge("rgb_pixels", as_pixels(golden.tensor("images")), 0.0)
    decoder_input = spec.raw(latents)
    golden.judge("vae_decoder_input", decoder_input, 1e-6)
    golden.judge("vae_pixels", spec.as_pixels(decoder_input[:, :3] + 0.5), 0.0)
    raw = golden.tensor("raw_mean") + golden.tensor("raw_std") * golden.tensor("noise")
    golden.judge("vae_latents", _encoded(raw, spec), 1e-6)


def _encoded(raw: Tensor, spec: VaeSpec) -> Tensor:
    """`spec.raw` is linear: its values at 0 and 1 tell its inverse."""
    at_zero = spec.raw(torch.zeros(1, raw.shape[1], 1, 1))
    return (raw - at_zero) / (spec.raw(torch.ones(1, raw.shape[1], 1, 1)) - at_zero)


# Averages over training -----------------------------------------------------------------------------------------------
def judge_phema(golden: Golden) -> None:
    has = golden.arrays
    golden.judge("exp_to_std", phema.relative_std(has["exp"]), 1e-9, "absolute")
    golden.judge("std_to_exp", phema.exponent(has["std"]), 1e-9, "relative")
    golden.judge("beta", phema.decay(has["beta_std"], has["beta_t_next"], has["beta_t_delta"]), 1e-9, "absolute")
    golden.judge("response", _response(has["resp_ofs"], has["resp_std"], int(has["len"])), 1e-9, "absolute")
    ends, stds = has["in_ofs"], has["in_std"]
    golden.judge("correlation", phema.inner_products(ends, stds, ends, stds), 1e-9, "absolute")
    golden.judge("coefs", phema.coefficients(ends, stds, float(has["out_ofs"]), has["out_std"]), 1e-9, "absolute")
    early = ends <= has["early_ofs"]
    mine = phema.coefficients(ends[early], stds[early], float(has["early_ofs"]), has["out_std"])
    golden.judge("coefs_early", mine, 1e-9, "absolute")
    _judge_tracked(golden)


def _response(ends: np.ndarray, stds: np.ndarray, length: int) -> np.ndarray:
    """The profiles at whole times from 0 on, each with the sum 1."""
    t, k = np.arange(length)[:, None], phema.exponent(stds)[None]
    values = np.where(t <= ends, (t / ends) ** k, 0)
    return np.asarray(values / values.sum(axis=0))


def _judge_tracked(golden: Golden) -> None:
    """Averages of a parameter that moves, and what is reconstructed from float16 copies of them."""
    has, batch = golden.arrays, int(golden.arrays["batch"])
    ema = [golden.tensor("w_init").float().clone() for _ in has["ema_stds"]]
    plain = golden.tensor("w_init").float().clone()
    averages, plains, snapshots = [], [], []
    for step, w in enumerate(golden.tensor("w_steps")):
        seen = (step + 1) * batch
        for one, std in zip(ema, has["ema_stds"], strict=True):
            one.lerp_(w, 1 - float(phema.decay(std, seen, batch)))
        halflife = min(float(has["halflife_Mimg"]) * 1e6, seen * float(has["rampup_ratio"]))
        plain.lerp_(w, 1 - 0.5 ** (batch / halflife))
        averages.append(torch.stack(ema))
        plains.append(plain.clone())
        if step in has["snap_steps"]:
            snapshots += [(seen, std, one.half()) for one, std in zip(ema, has["ema_stds"], strict=True)]
    golden.judge("ema", torch.stack(averages), 1e-5)
    golden.judge("traditional", torch.stack(plains), 1e-5)
    ends, stds = (np.array([s[i] for s in snapshots], dtype=np.float64) for i in (0, 1))
    golden.judge("snap_nimg", torch.from_numpy(ends.astype(np.int64)), 0.0)
    golden.judge("snap_std", torch.from_numpy(stds), 1e-9, "absolute")
    weights = phema.coefficients(ends, stds, ends[-1], has["recon_std"])
    golden.judge("recon_coefs", weights, 1e-9, "absolute")
    sums = torch.zeros(weights.shape[1], ema[0].numel())
    for row, (_, _, copy) in zip(weights.tolist(), snapshots, strict=True):
        for total, weight in zip(sums, row, strict=True):
            total.add_(copy.float(), alpha=weight)
    golden.judge("reconstructed", sums, 1e-5)
    golden.judge("reconstructed_f16", sums.half(), 1e-3, "relative")
