"""Exported files as a sampler's guided denoiser: do they fit the job, and what do they return for which guidances?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.graph import Function
from dgfast.guidance import OUTSIDE_WINDOW, DiscriminatorGuidance, Guidance
from dgfast.guidance.declaration import all_options, guiding, off_values
from dgfast.guidance.weights import images, weights
from dgfast.pure_function import PureFunction
from dgfast.runtimes import Runtime
from dgfast.solvers import SOLVERS


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


def runtime_of(engine: Engine) -> Runtime:
    """The file as a sampler's runtime. What it builds is the file's, whatever the shapes: only the weights differ.

    Its `build` raises UserError for a guidance that the file has no input for.
    """

    def build(function: Function, example: Sequence[Tensor | None]) -> Function:
        if not isinstance(function, PureFunction):
            raise UserError(f"{engine.path} holds a function of a job, which stands in for no other")
        return generated_by(engine) if function.name == "generator" else guided_by(engine, function)

    return Runtime(str(engine.path), build)


def guided_by(engine: Engine, replaced: PureFunction) -> Function:
    """The file in the place of a guided denoiser, or posterior: guidances left out get the weight that is off.

    It computes what it computes whatever the weight, so calls outside of a window cost as much as those inside.

    Raises:
        UserError: a guidance that the file has no input for.
    """
    own = weights(replaced.guidances)
    for missing in (one for one in all_options() if one.input in own.keys() - engine.inputs.keys()):
        option = missing.name.replace("_", "-")
        raise UserError(f"{engine.path} has no {missing.input}: export it with --{option}, or sample without")
    for guidance in (one for one in replaced.guidances if one.levels):
        if guidance.second or [*guidance.levels] != json.loads(engine.metadata["sigmas"]):
            raise UserError(
                f"{engine.path} goes by other steps than these, on which {guidance.name} depends: export it anew with "
                "this solver, and sample with the bundle's own --steps and grid"
            )
    off = {name: value for name, value in off_values().items() if name in engine.inputs}
    values = {name: torch.tensor([float(own.get(name, value))]) for name, value in off.items()}
    judged = any(isinstance(guidance, DiscriminatorGuidance) for guidance in replaced.guidances)
    pictures = images(replaced.guidances)
    unused = engine.inputs.keys() - {*replaced.inputs, *values, *pictures}  # images of guidances whose weight is off

    def function(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        named = dict(zip(replaced.inputs, arguments, strict=True))
        x = named["x"]
        assert x is not None, "the labels alone may be missing"
        seen = {name: image.to(x).expand_as(x).contiguous() for name, image in pictures.items()}
        seen |= {name: torch.zeros_like(x) for name in unused}
        *results, log_ratio = _called(engine, {**named, **values, **seen})
        return *results, log_ratio if judged else torch.full_like(log_ratio, OUTSIDE_WINDOW)

    return function


def generated_by(engine: Engine) -> Function:
    """(latents, class_labels) -> (images,) of the file."""

    def function(latents: Tensor, class_labels: Tensor | None) -> tuple[Tensor, ...]:
        return _called(engine, {"latents": latents, "class_labels": class_labels})

    return function


def _called(engine: Engine, arguments: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The file's results in the type of the first argument; without a class, its classes are rows of zeros."""
    first = next(x for x in arguments.values() if x is not None)
    inputs = {name: x for name, x in arguments.items() if x is not None and name in engine.inputs}
    if "class_labels" in engine.inputs and "class_labels" not in inputs:
        inputs["class_labels"] = first.new_zeros(len(first), engine.inputs["class_labels"][0][1])
    return tuple(x.to(first.dtype) for x in engine(inputs).values())


def require_fit(engine: Engine, bundle: Bundle, sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    """Raises UserError if the file is not what this bundle's sampler calls under these settings."""
    _require(engine, bundle, SOLVERS[sampling.solver].function)
    if guidance.dg_every > 1:
        raise UserError("--dg-every needs the gradient itself, which no exported file returns")
    if guidance.apg_momentum:
        raise UserError("--apg-momentum goes from call to call, which no exported file remembers")
    try:
        made_with = json.loads(engine.metadata["guidance"]) | {
            "clip_denoised": json.loads(engine.metadata["sampling"])["clip_denoised"]
        }
        asked = json.loads(json.dumps(asdict(guidance) | {"clip_denoised": sampling.clip_denoised}))
        inside = [one for kind in guiding(guidance) if _has(engine, kind) for one in kind.options() if one.inside]
        differing = [
            name for name in ("clip_denoised", *(one.name for one in inside)) if made_with[name] != asked[name]
        ]
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


def _has(engine: Engine, guidance: type[Guidance]) -> bool:
    """Whether the guidance is in the file; `guided_by` says so if it has to be and is not."""
    return any(weight.input in engine.inputs for weight in guidance.weights().values())
