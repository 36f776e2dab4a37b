"""The networks; `build` is the one way to make one."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dgfast import denoiser
from dgfast.nets import from_diffusers
from dgfast.nets.adm import EncoderUNetModel, create_classifier
from dgfast.nets.adm_unet import UNetModel, create_model
from dgfast.nets.dhariwal_unet import DhariwalUNet
from dgfast.nets.dit import DiT
from dgfast.nets.edm2 import EDM2UNet
from dgfast.nets.features import FeatureNet
from dgfast.nets.generator import Generator
from dgfast.nets.noise_predictor import NoisePredictor
from dgfast.nets.song_unet import SongUNet
from dgfast.nets.text_options import numbers


def _adm(
    img_resolution: int, in_channels: int, out_channels: int, label_dim: int, **keywords: Any
) -> nn.Module:  # fmt: skip
    shape = {"image_size": img_resolution, "in_channels": in_channels, "learn_sigma": out_channels > in_channels}
    classes = {"class_cond": label_dim > 0, "num_classes": label_dim}
    return create_model(**{**shape, **classes, **keywords})


def _dit(img_resolution: int, in_channels: int, out_channels: int, label_dim: int, **keywords: Any) -> nn.Module:
    learn_sigma = out_channels > in_channels
    return DiT(img_resolution, in_channels=in_channels, num_classes=label_dim, learn_sigma=learn_sigma, **keywords)


_RAW: dict[str, Callable[..., nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
_DDPM_RAW: dict[str, Callable[..., nn.Module]] = {"create_model": _adm, "DiT": _dit}
_FLOW_RAW: dict[str, Callable[..., nn.Module]] = {"SiT": _dit}  # SiT's blocks are DiT's
_RAW_OF = {"DDPMPrecond": _DDPM_RAW, "FlowPrecond": _FLOW_RAW}
_PLAIN: dict[str, Callable[..., nn.Module]] = {
    "EncoderUNetModel": EncoderUNetModel,
    "UNetModel": UNetModel,
    "create_classifier": create_classifier,
    "create_model": create_model,
    "DiT": DiT,
    "FeatureNet": FeatureNet,
    "Generator": Generator,
    "NoisePredictor": NoisePredictor,
}
KINDS = (*denoiser.PRECONDITIONERS, *_PLAIN)
_TYPES = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
_LISTS = ("channel_mult", "attn_resolutions", "attention_resolutions", "resample_filter")


def build(kind: str, **keywords: Any) -> nn.Module:
    """A network of the given kind, randomly initialised, from the keywords of its official constructor.

    Kinds: EDM's preconditioners `EDMPrecond`, `VPPrecond`, `VEPrecond` and `iDDPMPrecond`, whose keyword `model_type`
    names the raw network (SongUNet or DhariwalUNet) and which pass it what they do not use themselves; `DDPMPrecond`,
    whose raw network is ADM's (create_model) or DiT; `FlowPrecond`, whose raw network is SiT; `DiffusersPrecond`, whose
    raw network is one of diffusers; EDM2's, `EDM2Precond`, which its code calls Precond; ADM's `EncoderUNetModel` and
    `UNetModel`, and `create_classifier` and `create_model`, the same from guided-diffusion's and DG's option names;
    `DiT`; and our own: `FeatureNet` for the metrics, the one-step `Generator`, and the `NoisePredictor` that trains it.
    Where a constructor has a list of numbers, one number and text such as "16,8" are taken too.

    Raises:
        ValueError: unknown kind or model type, a keyword that the constructor does not know or misses, a
            size of zero.
    """
    try:
        keywords |= {name: numbers(keywords[name], name) for name in _LISTS if name in keywords}
        if kind in _PLAIN:
            return _PLAIN[kind](**keywords)
        if kind == "EDM2Precond":
            return _build_edm2(**keywords)
        if kind == "DiffusersPrecond":
            return from_diffusers.build(**keywords)
        if kind in denoiser.PRECONDITIONERS:
            return _build_denoiser(kind, **keywords)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{kind}: {error}") from error
    raise ValueError(f"unknown kind of network {kind!r}; known kinds: {', '.join(KINDS)}")


def defaults(kind: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructors of such a network take for those of their keywords that are left out."""
    return {
        parameter.name: parameter.default
        for parameter in _parameters(kind, keywords)
        if parameter.default is not parameter.empty and parameter.name not in keywords
    }


def check_types(kind: str, keywords: Mapping[str, Any]) -> None:
    """Compare keywords with the constructors' annotations: a constructor may keep what only its forward trips over.

    Raises:
        ValueError: text, a number or a truth value where another of them belongs.
    """
    for parameter in _parameters(kind, keywords):
        value, allowed = keywords.get(parameter.name, parameter.default), _TYPES.get(parameter.annotation)
        if allowed and parameter.name in keywords and type(value) not in allowed:
            raise ValueError(f"{parameter.name} {value!r:.80} is not of the type {parameter.annotation.__name__}")


def _parameters(kind: str, keywords: Mapping[str, Any]) -> list[inspect.Parameter]:
    raw = {**_RAW, "create_model": create_model, "DiT": DiT, "SiT": DiT}.get(keywords.get("model_type", ""))
    raw = EDM2UNet if kind == "EDM2Precond" else raw
    constructors = [denoiser.PRECONDITIONERS.get(kind, _PLAIN.get(kind)), raw]
    signatures = [inspect.signature(constructor) for constructor in constructors if constructor]
    return [parameter for signature in signatures for parameter in signature.parameters.values()]


def _build_denoiser(
    kind: str,
    *,
    img_resolution: int,
    img_channels: int,
    model_type: str,
    label_dim: int = 0,
    use_fp16: bool = False,  # how the official code would run it; precision is the runtime's choice here
    **keywords: Any,
) -> denoiser.Preconditioner:
    known = _RAW_OF.get(kind, _RAW)
    if model_type not in known:
        raise ValueError(f"{kind}: unknown model_type {model_type!r}; known: {', '.join(known)}")
    wrap = denoiser.PRECONDITIONERS[kind]
    own = {name: keywords.pop(name) for name in inspect.signature(wrap).parameters if name in keywords}
    doubled = kind == "iDDPMPrecond" or (kind in _RAW_OF and own.get("learn_sigma", True))
    raw = known[model_type](
        img_resolution=img_resolution,
        in_channels=img_channels,
        out_channels=img_channels * (2 if doubled else 1),
        label_dim=label_dim,
        **keywords,
    )
    return wrap(raw, img_resolution, img_channels, label_dim, **own)


def _build_edm2(
    *,
    img_resolution: int,
    img_channels: int,
    label_dim: int,
    use_fp16: bool = True,  # see `_build_denoiser`
    sigma_data: float = 0.5,
    logvar_channels: int = 128,
    **keywords: Any,
) -> denoiser.Preconditioner:
    raw = EDM2UNet(img_resolution, img_channels, label_dim, **keywords)
    return denoiser.EDM2Precond(raw, img_resolution, img_channels, label_dim, sigma_data, logvar_channels)
