"""The judge of what diffusers' guiders do to two predictions, step after step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dgfast.guidance import (
    AdaptiveProjectedGuidance,
    CFGZeroStar,
    ClassifierFreeGuidance,
    Guidance,
    MagnitudeAwareGuidance,
    Rescale,
    TangentialGuidance,
    guided_denoiser,
)
from dgfast.guidance.frequency_decoupled import decoupled, pyramid
from dgfast.guidance.memory import remembering
from dgfast.guidance.rescale import rescaled
from dgfast.guidance.spaces import prediction
from tests.support.golden import Golden

GUIDANCE_TOL, AS_DENOISED, SINGULAR = 1e-4, 5.0, {"pred": 5.0, "D": 10.0}  # and factors for what is less well known
_ROUNDING = 1e-12  # of a prediction that a guider sets to zero, and we an image to its origin
_SPACES = {"denoised": "x0", "eps": "eps", "flow": "flow", "vpred": "v"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "AdaptiveProjectedGuidance": {"eta": 1.0, "adaptive_projected_guidance_rescale": 15.0},
    "AdaptiveProjectedMixGuidance": {
        "guidance_scale": 3.5, "adaptive_projected_guidance_scale": 10.0, "adaptive_projected_guidance_momentum": -0.5,
        "adaptive_projected_guidance_rescale": 10.0, "adaptive_projected_guidance_start_step": 5, "eta": 0.0,
    },
    "ClassifierFreeZeroStarGuidance": {"zero_init_steps": 1},
    "FrequencyDecoupledGuidance": {"guidance_scales": [10.0, 5.0]},
    "MagnitudeAwareGuidance": {"guidance_scale": 10.0, "alpha": 8.0},
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "guidance_scale": 7.5, "guidance_rescale": 0.0, "start": 0.0, "stop": 1.0, "use_original_formulation": False,
    "adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_norm_dim": None,
    "parallel_weights": None,
}  # fmt: skip


def judge_guiders(golden: Golden) -> None:
    for case, about in golden.meta["cases"].items():
        kind = about["class"].rpartition(".")[2]
        settings = _COMMON | _DEFAULTS.get(kind, {}) | about["kwargs"]
        space = _SPACES[about["space"]]
        if kind == "FrequencyDecoupledGuidance":
            _judge_pyramid(golden, case, settings)
            continue
        x, sigma = golden.tensor("x").double(), golden.tensor("sigma")
        denoised, states = map(torch.stack, zip(*_steps(golden, kind, settings, space), strict=True))
        predicted = [prediction(space, *each) for each in zip(denoised, x, _of_batch(x, sigma), strict=True)]
        pred = torch.stack(predicted)
        pred = pred.where(pred.abs() > _ROUNDING, 0.0)
        results = {"pred": pred, "D": denoised, "state": states}
        for name, mine in results.items():
            if golden.wants(f"{case}/{name}"):
                factor = AS_DENOISED if name == "D" else 1.0
                factor *= SINGULAR.get(name, 1.0) if kind.startswith("Tangential") else 1.0
                golden.judge(f"{case}/{name}", mine, factor * GUIDANCE_TOL)


def _steps(golden: Golden, kind: str, settings: dict[str, Any], space: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The denoised images and the momentum of each step."""
    x, sigma = golden.tensor("x").double(), golden.tensor("sigma")
    memory = torch.zeros_like(x[0])
    for k, (noisy, level) in enumerate(zip(x, _of_batch(x, sigma), strict=True)):
        conditional, unconditional = (golden.tensor(key)[k].double() for key in ("D_c", "D_u"))

        def network(
            x: Tensor, sigma: Tensor, labels: Tensor | None, pair: Any = (conditional, unconditional)
        ) -> Tensor:
            given: Tensor = pair[labels is None]
            return given

        guidance, scale = _guidance(kind, settings, space, network, sigma.tolist())
        make = partial(guided_denoiser, network)
        labels = torch.ones(len(noisy), 1)
        if isinstance(guidance, AdaptiveProjectedGuidance):
            function = remembering(make, [guidance]) if guidance.remembers else make([guidance])
            results = function(noisy, level, labels, *([memory] if guidance.remembers else []))
            memory = results[-1] if guidance.remembers else memory
            kept = (results[0] - conditional) / (guidance.scale - 1)  # diffusers adds it to the unconditional images
            if kind.endswith("MixGuidance") and k <= settings["adaptive_projected_guidance_start_step"]:
                kept, scale = conditional - unconditional, settings["guidance_scale"]
            base = conditional if settings["use_original_formulation"] else unconditional
            yield base + scale * kept, memory
        else:
            repairs = [Rescale(settings["guidance_rescale"], space)] if settings["guidance_rescale"] else []
            yield make([guidance, *repairs])(noisy, level, labels)[0], memory


def _guidance(
    kind: str, settings: dict[str, Any], space: str, network: Any, levels: list[float]
) -> tuple[Guidance, float]:
    """Our guidance of that kind, and diffusers' scale."""
    scale = settings["guidance_scale"]
    own: tuple[Any, Any, Any] = network, scale + settings["use_original_formulation"], _interval(settings, levels)
    if kind.startswith("AdaptiveProjected"):
        scale = settings.get("adaptive_projected_guidance_scale", scale)
        momentum = settings["adaptive_projected_guidance_momentum"] or 0.0
        over = {None: "image", 1: "pixel"}[settings["adaptive_projected_guidance_norm_dim"]]
        threshold = settings["adaptive_projected_guidance_rescale"]
        return AdaptiveProjectedGuidance(*own, settings["eta"], threshold, momentum, space, over), scale
    if kind == "ClassifierFreeZeroStarGuidance":
        return CFGZeroStar(*own, space, settings["zero_init_steps"]).along([*levels, 0.0]), scale
    if kind == "TangentialClassifierFreeGuidance":
        return TangentialGuidance(*own, space), scale
    if kind == "MagnitudeAwareGuidance":
        return MagnitudeAwareGuidance(*own, settings["alpha"], space), scale
    assert kind == "ClassifierFreeGuidance", f"no guidance for {kind}"
    return ClassifierFreeGuidance(*own), scale


def _interval(settings: dict[str, Any], levels: list[float]) -> tuple[float, float]:
    """The noise levels of the steps from int(start N) to int(stop N), the last one left out."""
    first, last = (int(settings[end] * len(levels)) for end in ("start", "stop"))
    return [*levels, 0.0][last], levels[first] if first else torch.inf


def _judge_pyramid(golden: Golden, case: str, settings: dict[str, Any]) -> None:
    plain, reference = (golden.tensor(f"fdg/{key}").double() for key in ("D_c", "D_u"))
    scales, parallel = settings["guidance_scales"], settings["parallel_weights"]
    mixed = reference + decoupled(plain, reference, scales, parallel)
    if settings["guidance_rescale"]:
        mixed = rescaled(mixed, plain, plain, torch.ones(len(plain)), settings["guidance_rescale"], "x0")
    golden.judge(f"{case}/pred", mixed, GUIDANCE_TOL)
    for i, band in enumerate(pyramid(plain, len(scales))):
        if golden.wants(f"{case}/pyramid_D_c_{i}"):
            golden.judge(f"{case}/pyramid_D_c_{i}", band, GUIDANCE_TOL)


def _of_batch(x: Tensor, sigma: Tensor) -> Tensor:
    return sigma[:, None].expand(x.shape[:2])
