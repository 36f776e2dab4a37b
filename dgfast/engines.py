"""Exported files as a sampler's guided denoiser: do they fit the job, and what do they return for which guidances?"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.guidance import Guidance
from dgfast.guidance.weights import OFF, weights

_SETTINGS = {"dg_weight": ("dg_window", "published_window"), "cfg_scale": ("guidance_interval",)}


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


def guided_by(engine: Engine) -> Callable[[tuple[Guidance, ...]], Callable[..., tuple[Tensor, ...]]]:
    """The guided denoiser of the file for each set of guidances: those left out get the weight that turns them off.

    It computes what it computes whatever the weight, so calls outside of a window cost as much as those inside.
    """

    def guided(guidances: tuple[Guidance, ...]) -> Callable[..., tuple[Tensor, ...]]:
        given = weights(guidances)
        missing = sorted(given.keys() - engine.inputs.keys())
        if missing:
            option = missing[0].replace("_", "-")
            raise UserError(f"{engine.path} has no {missing[0]}: export it with --{option}, or sample without")
        values = {name: given.get(name, OFF[name]) for name in engine.inputs if name in OFF}

        def denoise(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
            arguments = {"x": x, "sigma": sigma}
            if "class_labels" in engine.inputs:
                classes = engine.inputs["class_labels"][0][1]
                arguments["class_labels"] = x.new_zeros(len(x), classes) if class_labels is None else class_labels
            arguments |= {name: torch.tensor([float(value)]) for name, value in values.items()}
            results = engine(arguments)
            return results["denoised"].to(x.dtype), results["log_ratio"].to(sigma.dtype)

        return denoise

    return guided


def require_fit(engine: Engine, bundle: Bundle, guidance: GuidanceConfig) -> None:
    """Raises UserError if the file is not the guided denoiser of this bundle under these settings."""
    said = engine.metadata
    if said.get("what") != "denoiser":
        raise UserError(f"{engine.path} holds {said.get('what', 'no function of dgfast')}; export with --what denoiser")
    if said.get("weights_sha256") != bundle.fingerprint():
        raise UserError(
            f"{engine.path} was exported from other weights (bundle {said.get('bundle')}) than those of {bundle.name}; "
            f"export it anew"
        )
    if guidance.boosting or guidance.dg_every > 1:
        raise UserError("boosting and --dg-every need the gradient itself, which no exported file returns")
    try:
        made_with = json.loads(said["guidance"])
        differing = [
            name for weight, names in _SETTINGS.items() if weight in engine.inputs for name in names
            if _plain(made_with[name]) != _plain(getattr(guidance, name))
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{engine.path}: what it says of its guidance cannot be read; export it anew") from error
    if differing:
        raise UserError(
            f"{engine.path} was exported with another {differing[0]}, {made_with[differing[0]]}; export it anew"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
