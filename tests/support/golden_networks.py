"""The judges of the official networks, and of the gradients of guidance."""

import copy
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import nets
from dgfast import noise_levels as nl
from dgfast.bundle import load_state
from dgfast.checkpoints import nvidia_pickle
from dgfast.denoiser import EDM2Precond
from dgfast.guidance import DiscriminatorGuidance
from dgfast.nets.discriminator import Discriminator, NoisyClassifier
from tests.support.golden import (
    NET_TOL,
    NO_LABEL_CALL,
    NO_LABEL_SIGMA,
    SIGMA_TOL,
    TABLE_TOL,
    UNCONDITIONAL_GRADIENT_TOL,
    Golden,
    correction_of,
)

# Denoisers ------------------------------------------------------------------------------------------------------------
KINDS = {"Precond": "EDM2Precond"}
"""Our names of the official classes that have others."""


def judge_denoiser(golden: Golden) -> None:
    net = golden.net(KINDS.get(golden.meta["cls"], golden.meta["cls"]), "config", "prefix", "state_dict")
    judge_denoised(golden, net)
    if isinstance(net, EDM2Precond):  # as bundles give it
        net = copy.deepcopy(net)
        net.fold()
        judge_denoised(golden, net)
    judge_noise_levels_of_net(golden, net)


def judge_denoised(golden: Golden, net: Any) -> None:
    x_base, labels = golden.tensor("x_base"), golden.labels()
    augment = golden.tensor("augment_labels") if "augment_labels" in golden.arrays else None
    calls = {"D": list(zip(golden.tensor("x_scale"), golden.tensor("sigma"), strict=True))}
    if "sigma_vec" in golden.arrays:
        calls["D_vec"] = [(golden.tensor("x_scale_vec")[:, None, None, None], golden.tensor("sigma_vec"))]
    for base, inputs in calls.items():
        for suffix, conditions in (("", (labels,)), ("_nolabel", ()), ("_augment", (labels, augment))):
            if golden.wants(base + suffix):
                outputs = torch.stack([net(scale * x_base, sigma, *conditions) for scale, sigma in inputs])
                one = base == "D_vec" or (suffix == "_nolabel" and isinstance(net, EDM2Precond))
                call = NO_LABEL_CALL if base == "D" else 0
                golden.judge_all(base + suffix, outputs[call] if one else outputs, NET_TOL)
    for key, levels in (("logvar", "sigma"), ("logvar_vec", "sigma_vec")):
        if key in golden.arrays:
            golden.judge(key, net.log_variance(golden.tensor(levels)).view(golden.arrays[key].shape), NET_TOL)


def level_tol(net: nn.Module, discretization: str = "edm") -> float:
    return TABLE_TOL if discretization == "iddpm" or hasattr(net, "u") else SIGMA_TOL


def judge_noise_levels_of_net(golden: Golden, net: Any) -> None:
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
        self.feature_map = nn.Parameter(features)
        self.feature_channels, self.feature_size = features.shape[1], features.shape[-1]

    def features(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.feature_map


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
        discriminator = Discriminator(GivenFeatures(features), head)  # type: ignore[arg-type]
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
    by_prefix: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for prefix, x, sigma in gradient_calls(golden):
        correction, log_ratio = correction_of(guidance, x, sigma, labels, x)
        by_prefix.setdefault(prefix, []).append((-correction, log_ratio))  # DG subtracts its guidance, dgfast adds
    for prefix, results in by_prefix.items():
        gradients, log_ratios = (torch.stack(column) for column in zip(*results, strict=True))
        golden.judge_all(f"{prefix}guidance", gradients if prefix == "" else gradients[0], tol)
        golden.judge_log_ratio(f"{prefix}log_ratio", log_ratios if prefix == "" else log_ratios[0], tol)


# Pickles --------------------------------------------------------------------------------------------------------------
def judge_pickle(golden: Golden) -> None:
    """The network in the pickle beside the file, read without running any of it."""
    pickle = golden.path.with_name(golden.path.stem.removesuffix("_expected") + ".pkl")
    assert pickle.is_file(), f"{golden.path.name} belongs to {pickle.name}, which is not there"
    snapshot = nvidia_pickle.read(pickle)
    net = nets.build(snapshot.kind, **snapshot.keywords).eval().requires_grad_(False)
    load_state(net, snapshot.tensors, pickle)
    recipe = golden.net(snapshot.kind, "config", "prefix").state_dict()
    wrong = [
        name for name, value in snapshot.tensors.items()
        if not torch.equal(value, recipe[name].to(value.dtype))
        or not torch.equal(net.state_dict()[name], value.float())
    ]  # fmt: skip
    golden.failures += [f"weights: {', '.join(wrong)}"] if wrong else []
    if isinstance(net, EDM2Precond):
        judge_encoder_of(golden, snapshot)
        if "D_as_loaded" in golden.arrays:
            x, labels = golden.tensor("x_base"), golden.labels()
            calls = zip(golden.tensor("x_scale"), golden.tensor("sigma"), strict=True)
            outputs = torch.stack([net(scale * x, level, labels) for scale, level in calls])
            golden.judge("D_as_loaded", outputs, golden.meta["tol_as_loaded"])
        net.fold()
        judge_denoised(golden, net)
        return
    x, sigma, labels = golden.tensor("x_base"), golden.tensor("sigma"), golden.labels()
    if "D" in golden.arrays:
        calls = zip(golden.tensor("x_scale"), sigma, strict=True)
        golden.judge("D", torch.stack([net(scale * x, level, labels) for scale, level in calls]), NET_TOL)
    if "D_nolabel" in golden.arrays:
        golden.judge("D_nolabel", net(x, torch.tensor(NO_LABEL_SIGMA), None), NET_TOL)


def judge_encoder_of(golden: Golden, snapshot: nvidia_pickle.Snapshot) -> None:
    """What the pickle says of its encoder."""
    found = {"encoder": snapshot.encoder, "encoder_vae_name": snapshot.vae and snapshot.vae.source}
    for entry, value in found.items():
        if golden.meta.get(entry) != value:
            golden.failures.append(f"{entry}: {value!r}, not {golden.meta.get(entry)!r}")
    for entry in ("scale", "bias"):
        if f"encoder_{entry}" in golden.arrays:
            golden.judge(f"encoder_{entry}", torch.tensor(getattr(snapshot.vae, entry)), 0.0, "absolute")
