"""A network that diffusers saved into a folder, read by its own loader: safetensors alone, and nothing is fetched."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgfast import bounds, weights
from dgfast.checkpoints import DENOISERS, one_line
from dgfast.checkpoints.account import Assumed, listed
from dgfast.checkpoints.network import Converted, counted, require_finite
from dgfast.denoiser.diffusers import BETA_SCHEDULES, PREDICTIONS
from dgfast.errors import UserError
from dgfast.latents import SCALE
from dgfast.nets import from_diffusers

KIND = "DiffusersPrecond"
_SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
)  # fmt: skip
"""Those that have one noise schedule in common, with the same defaults."""
_OF_TIME: dict[str, Any] = {
    "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip
_CLASSES = dict.fromkeys(from_diffusers.MODELS, "") | {"Transformer2DModel": from_diffusers.MODELS[1]}
"""What a configuration may call a network; the last is an older name of DiT's."""


def read(folder: Path, role: str, told: Mapping[str, Any]) -> Converted:
    """The score network in a folder of a pipeline, or of a model alone.

    Args:
        told: keywords that go over those in the folder, see `nets.from_diffusers.build`.

    Raises:
        UserError: another role, no such network or scheduler there, diffusers missing, weights that are not finite.
    """
    if role not in DENOISERS:
        raise UserError(f"{folder} is a folder of diffusers, of which dgfast reads score networks: give --role score")
    place = _network(folder)
    config, name = _json(place / "config.json"), _class_name(place)
    if name not in _CLASSES or (name == "Transformer2DModel" and config.get("norm_type") != "ada_norm_zero"):
        raise UserError(f"{place}: diffusers' {one_line(name)}; dgfast reads {' and '.join(from_diffusers.MODELS)}")
    name = _CLASSES[name] or name
    seen, sampling = from_diffusers.keywords_of(name, config) | _time(folder, told), dict[str, Any]()
    if "img_resolution" not in {**seen, **told}:
        raise UserError(f"{place}: its sample_size is open; give --set img_resolution=64, or [height,width]")
    net, scheduler = _loaded(name, place), _scheduler(folder)
    if scheduler is not None and name == from_diffusers.MODELS[0]:
        sampling = {"clip_denoised": bool(scheduler.get("clip_sample", True))}
    keywords = {**seen, **told}
    keywords["learn_sigma"] = net.config.get("out_channels") == 2 * keywords["img_channels"]
    tensors = {f"model.model.{key}": value for key, value in net.state_dict().items()}
    built = weights.build(KIND, keywords, tensors, place)
    require_finite(tensors, place)
    assumed = [
        Assumed(key, value, "its scheduler's default", f"--set {key}=...")
        for key, value in _OF_TIME.items()
        if scheduler is not None and key not in scheduler and key not in told
    ]
    facts = {
        "file": f"{one_line(folder.name)}, folder of diffusers: {name}"
        + (f" and {scheduler['_class_name']}" if scheduler is not None else ""),
        "tensors": counted(tensors),
        "in the folder": listed({k: v for k, v in keywords.items() if k not in {*told, *(a.name for a in assumed)}}),
        "told": listed(told),
    }
    return Converted(built, KIND, keywords, facts, assumed, sampling)


def is_one(folder: Path) -> bool:
    """Whether it is a folder of diffusers with a network that may be a score network."""
    if not folder.is_dir() or (folder / "bundle.json").exists():
        return False
    return _network(folder) != folder or _class_name(folder) in _CLASSES


def vae_of(folder: Path) -> str | None:
    """Where the pipeline's decoder of latents lies; None where it has none.

    Raises:
        UserError: one whose latents are scaled otherwise than Stable Diffusion's.
    """
    place = folder / "vae"
    if not place.is_dir():
        return None
    scale = _json(place / "config.json").get("scaling_factor", SCALE)
    if scale != SCALE:
        raise UserError(f"{place}: its scaling_factor is {scale!r:.40}; give --vae, and vae.scale in bundle.json")
    return str(place.resolve())


def _network(folder: Path) -> Path:
    """Where the score network lies in the folder of a pipeline; else that folder itself, which may be a model's."""
    inside = (folder / "unet", folder / "transformer")
    return next((place for place in inside if (place / "config.json").is_file()), folder)


def _class_name(place: Path) -> str:
    try:
        return str(_json(place / "config.json").get("_class_name"))
    except UserError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = bounds.read_json(path)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the description of anything of diffusers")
    return content


def _loaded(name: str, place: Path) -> Any:
    """The network in that folder, in float32."""
    made = from_diffusers.model_class(name)
    if not any(place.glob("*.safetensors")):
        raise UserError(f"{place}: no {name} with safetensors weights there; save it by diffusers' save_pretrained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made.from_pretrained(place, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise UserError(f"{place}: no {name} with safetensors weights there ({one_line(error, 200)})") from error


def _scheduler(folder: Path) -> dict[str, Any] | None:
    """The scheduler's configuration, in the pipeline's folder or beside the network; None where there is none."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return _json(path)
    return None


def _time(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule and the prediction.

    Raises:
        UserError: no scheduler and nothing told in its place, or one that dgfast has no schedule of.
    """
    config = _scheduler(folder)
    if config is None:
        if not {"beta_schedule", "prediction_type"} <= told.keys():
            raise UserError(
                f"{folder} has no scheduler_config.json: give --set beta_schedule=linear and "
                "--set prediction_type=epsilon, or whatever it was trained with"
            )
        return {}
    name = str(config.get("_class_name"))
    if name not in _SCHEDULERS:
        raise UserError(
            f"{folder}: its scheduler is {one_line(name)}; dgfast has the schedules of {_SCHEDULERS[0]}'s kind"
        )
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"{folder}: its scheduler has {key}, which dgfast does not have")
    values = {key: config.get(key, usual) for key, usual in _OF_TIME.items()}
    for key, known in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTIONS)):
        if values[key] not in known and key not in told:
            raise UserError(f"{folder}: its scheduler's {key} is {values[key]!r:.40}; dgfast has {', '.join(known)}")
    return values
