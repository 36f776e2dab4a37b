"""Exported files as a sampler's guided denoiser: do they fit the job, and what do they return for which guidances?"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import OUTSIDE_WINDOW, Guidance
from dgfast.guidance.weights import OFF, weights

Function = Callable[..., tuple[Tensor, ...]]

DENOISER = ("x", "sigma", "class_labels")
"""What a sampler calls a guided denoiser with, by the names that an exported file has for it."""
POSTERIOR = (*DENOISER, "log_least", "log_most")
"""The same for what an ancestral solver calls, see `guidance.guided_posterior`."""

_SETTINGS = {
    "dg_weight": ("dg_window", "published_window", "dg_schedule"),
    "classifier_scale": ("classifier_schedule",),
    "cfg_scale": ("guidance_interval", "cfg_branch", "cfg_channels"),
    "diversity": ("normalize", "target_class"),
    "fidelity": ("normalize", "base_class", "clean_time"),
}
"""What of `GuidanceConfig` is inside of a file beside the weight that is an input of it."""


def function_of(solver: str) -> str:
    """Which function a solver calls: "posterior" for the ancestral one, else "denoiser"."""
    return "posterior" if solver == "ddpm" else "denoiser"


class Engine(Protocol):
    """A function in a file, opened by a runtime.

    Attributes:
        path: the file. inputs: its inputs by name. metadata: what `export/onnx_file.py` says of it.
        batch: the batch size it was made for, None if it is open.
    """

    path: Path

    @property
    def inputs(self) -> Mapping[str, Any]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def batch(self) -> int | None: ...

    def __call__(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def guided_by(engine: Engine) -> Callable[[tuple[Guidance, ...]], Function]:
    """The file's guided denoiser, or posterior, for each set of guidances: those left out get the weight that is off.

    It computes what it computes whatever the weight, so calls outside of a window cost as much as those inside.
    """

    def guided(guidances: tuple[Guidance, ...]) -> Function:
        given = weights(guidances)
        missing = sorted(given.keys() - engine.inputs.keys())
        if missing:
            option = "boosting" if missing[0] == "dg_boost" else missing[0].replace("_", "-")
            raise UserError(f"{engine.path} has no {missing[0]}: export it with --{option}, or sample without")
        values = {name: torch.tensor([float(given.get(name, OFF[name]))]) for name in engine.inputs if name in OFF}

        def function(x: Tensor, sigma: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
            arguments = dict(zip(POSTERIOR, (x, sigma, *further), strict=False))
            *results, log_ratio = _called(engine, {**arguments, **values})
            return *results, log_ratio if "dg_weight" in given else torch.full_like(log_ratio, OUTSIDE_WINDOW)

        return function

    return guided


def generated_by(engine: Engine) -> Function:
    """(latents, class_labels) -> (images,) of the file."""

    def function(latents: Tensor, class_labels: Tensor | None) -> tuple[Tensor, ...]:
        return _called(engine, {"latents": latents, "class_labels": class_labels})

    return function


def _called(engine: Engine, arguments: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The file's results in the type of the first argument; without a class, its classes are rows of zeros."""
    first = next(x for x in arguments.values() if x is not None)
    given = {name: x for name, x in arguments.items() if x is not None and name in engine.inputs}
    if "class_labels" in engine.inputs and "class_labels" not in given:
        given["class_labels"] = first.new_zeros(len(first), engine.inputs["class_labels"][0][1])
    return tuple(x.to(first.dtype) for x in engine(given).values())


def require_fit(engine: Engine, bundle: Bundle, sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    """Raises UserError if the file is not what this bundle's sampler calls under these settings."""
    _require(engine, bundle, function_of(sampling.solver))
    if guidance.dg_every > 1:
        raise UserError("--dg-every needs the gradient itself, which no exported file returns")
    try:
        made_with = json.loads(engine.metadata["guidance"]) | {
            "clip_denoised": json.loads(engine.metadata["sampling"])["clip_denoised"]
        }
        asked = json.loads(json.dumps(vars(guidance) | {"clip_denoised": sampling.clip_denoised}))
        names = [name for weight in _on(guidance) for name in _SETTINGS.get(weight, ()) if weight in engine.inputs]
        differing = [name for name in ("clip_denoised", *names) if made_with[name] != asked[name]]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{engine.path}: what it says of its guidance cannot be read; export it anew") from error
    if differing:
        raise UserError(
            f"{engine.path} was exported with another {differing[0]}, {made_with[differing[0]]}; export it anew"
        )


def require_generator(engine: Engine, bundle: Bundle) -> None:
    """Raises UserError if the file is not the one-step generator of this bundle."""
    _require(engine, bundle, "generator")


def _require(engine: Engine, bundle: Bundle, what: str) -> None:
    said = engine.metadata
    if said.get("what") != what:
        raise UserError(f"{engine.path} holds {said.get('what', 'no function of dgfast')}; export with --what {what}")
    if said.get("weights_sha256") != bundle.fingerprint():
        raise UserError(
            f"{engine.path} was exported from other weights (bundle {said.get('bundle')}) than those of {bundle.name}; "
            f"export it anew"
        )


def _on(guidance: GuidanceConfig) -> list[str]:
    """The weights of the guidances that act, each under its first name."""
    on = [name for name in OFF if name in vars(guidance) and getattr(guidance, name) not in (OFF[name], None)]
    return list(dict.fromkeys({"dg_weight_2nd": "dg_weight", "cfg_scale_low": "cfg_scale"}.get(n, n) for n in on))
