"""Every number that the official implementations left in the golden folder.

The files say themselves what they hold: the network to build, the cases to run, the outputs to judge. A further file of
a known kind needs no change here, and an output that no line below judges is a failure.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dgfast import noise_levels as nl
from dgfast.guidance import OUTSIDE_WINDOW
from tests.support.golden import Golden, NetFactory, correction_of, every_nth
from tests.support.golden_dit import judge_dit
from tests.support.golden_edm2 import judge_edm2_sampler, judge_encoders, judge_phema
from tests.support.golden_guidance import judge_guiders
from tests.support.golden_networks import (
    gradient_calls,
    gradient_guidance,
    gradient_tol,
    judge_classifier,
    judge_denoiser,
    judge_discriminator,
    judge_gradient,
    judge_pickle,
)
from tests.support.golden_posterior import judge_posterior
from tests.support.golden_samplers import judge_adm, judge_dg_sampler, judge_edm_sampler, judge_vpsde
from tests.support.golden_sit import judge_sit


def kind_of(meta: dict[str, Any]) -> str:
    source = meta.get("source", "")
    if "pickle" in source:
        return "pickle"
    if source.startswith("openai/guided-diffusion"):
        return "adm"
    if source.startswith("alsdudrla10/DG_imagenet"):
        return "dit"
    if "diffusers" in source and "guiders" in source:
        return "guiders"
    if "pigdm_tau2" in meta.get("config", {}):
        return "posterior"
    if source.startswith("willisma/SiT"):
        return "sit"
    if "vpsde" in source:
        return "vpsde"
    if source.startswith("NVlabs/edm2") and "edm_sampler" in source:
        return "edm2 sampler"
    if source.startswith("NVlabs/edm2") and "encoders" in source:
        return "encoders"
    if source.startswith("NVlabs/edm2") and "phema" in source:
        return "phema"
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
        "edm2 sampler": lambda: judge_edm2_sampler(golden),
        "encoders": lambda: judge_encoders(golden),
        "phema": lambda: judge_phema(golden),
        "dg sampler": lambda: judge_dg_sampler(golden, monkeypatch),
        "guiders": lambda: judge_guiders(golden),
        "vpsde": lambda: judge_vpsde(golden),
        "adm": lambda: judge_adm(golden, monkeypatch),
        "dit": lambda: judge_dit(golden, monkeypatch),
        "posterior": lambda: judge_posterior(golden),
        "pickle": lambda: judge_pickle(golden),
        "sit": lambda: judge_sit(golden),
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
def test_golden_default_window_judges_each_sample_on_its_own(
    golden_folder: Path, own_golden_folder: Path, filled_net: NetFactory
) -> None:
    """DG judges the window by the smallest tau of the batch; by default, dgfast judges each sample by its own."""
    judged = 0  # the repository's own files too: this law of dgfast holds whatever files another folder has
    for path in sorted({*golden_folder.glob("*.npz"), *own_golden_folder.glob("dg_grad*.npz")}):
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
                    reference = -torch.from_numpy(golden.arrays[prefix + name][one])
                    ratio = torch.from_numpy(golden.arrays[f"{prefix}log_ratio"])[b]
                else:
                    alone = None if labels is None else labels[one]
                    reference, ratio = correction_of(guidance, x[one], sigma[one], alone, x[one])
                mine = every_nth(correction[one], reference.shape)
                assert reference.std() > 0 and (mine - reference).abs().max() <= tol * reference.std(), where
                assert log_ratio[b].item() == pytest.approx(float(ratio), abs=1e-3), where
                judged += 1
    assert judged, "no file has a call with one noise level a sample"
