"""What a bundle gets beside a network where nobody says: how its authors sample, what time a classifier reads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dgfast import presets
from dgfast.bundle import Bundle, VaeSpec
from dgfast.checkpoints import DENOISERS
from dgfast.checkpoints.account import Assumed
from dgfast.checkpoints.network import Converted
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.vp import adm_time_schedule

_DIT_WINDOW = (0.1011, 2.0)  # DiT-G++ guides at timesteps above 100: tau is 0.1006 at 100, 0.1016 at 101, 1.0034 at 999
_LATENT_CHANNELS = 4
_OF_DIFFUSERS = ("solver", "respacing")
_SIT_STEPS = 250
_SIT_CHANNELS = 3  # which classifier-free guidance guides; REPA's code guides all
_MEANS, _STDS = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the VAE's latents on ImageNet
EDM2_VAE = VaeSpec(
    "stabilityai/sd-vae-ft-mse",
    scale=tuple(0.5 / std for std in _STDS),
    bias=tuple(-0.5 * mean / std for mean, std in zip(_MEANS, _STDS, strict=True)),
    pixels="unit",
)
"""What EDM2's snapshots say of their latents, for networks of EDM2 in files that say nothing."""
_OF_TIME = (
    "noise_schedule",
    "steps",
    "predict_xstart",
    "rescale_timesteps",
    "path",
    "prediction",
)  # what networks of one bundle share


_OWN_TIME = ("DDPMPrecond", "FlowPrecond")


def beside_score(bundle: Bundle, converted: Converted, vae: str | None) -> tuple[Bundle, list[Assumed]]:
    """The bundle, to which such a score network is to be added, with its authors' sampling, window and decoder.

    Args:
        vae: as told; None: what the network's file says.
    """
    kind, keywords = converted.kind, converted.keywords
    assumed = _of_the_classifier(bundle, kind, keywords)
    is_dit, is_sit = (keywords.get("model_type") == name for name in ("DiT", "SiT"))
    is_edm2 = kind == "EDM2Precond"
    of_latents = (is_dit or is_sit or is_edm2) and keywords["img_channels"] == _LATENT_CHANNELS
    if converted.vae:
        bundle = replace(bundle, vae=replace(converted.vae, source=vae or converted.vae.source))
    elif vae:
        spec, whose = (replace(EDM2_VAE, source=vae), "EDM2's") if is_edm2 else (VaeSpec(vae), "Stable Diffusion's")
        bundle = replace(bundle, vae=spec)
        assumed += [
            Assumed(f"vae.{name}", list(value) if isinstance(value, tuple) else value, whose, "in bundle.json")
            for name, value in spec.described().items()
            if name != "source"
        ]
    elif bundle.vae is None and of_latents:
        assumed.append(Assumed("vae", "none", "it draws latents, which one decodes", "--vae"))
    if bundle.guidance == GuidanceConfig() and is_dit:
        bundle = replace(bundle, guidance=GuidanceConfig(dg_window=_DIT_WINDOW))
        assumed.append(Assumed("dg_window", ",".join(map(str, _DIT_WINDOW)), "DiT-G++'s", "dgfast sample --dg-window"))
    if bundle.guidance == GuidanceConfig() and is_sit and of_latents and not keywords.get("toward_noise"):
        bundle = replace(bundle, guidance=GuidanceConfig(cfg_channels=_SIT_CHANNELS))
        assumed.append(Assumed("cfg_channels", _SIT_CHANNELS, "its authors guide so", "dgfast sample --cfg-channels"))
    if bundle.sampling == SamplingConfig():
        sampling, entries = _published_sampling(kind, keywords)
        bundle, assumed = replace(bundle, sampling=sampling), assumed + entries
    return bundle, assumed


def like_its_sibling(bundle: Bundle, role: str, converted: Converted) -> Converted:
    """The network with the time of the bundle's other denoiser, as far as nobody told another and both have one."""
    for other, spec in bundle.nets.items():
        if other in DENOISERS and other != role and spec.kind == converted.kind in _OWN_TIME:
            shared = {
                entry.name: spec.keywords[entry.name]
                for entry in converted.assumed
                if entry.name in _OF_TIME and entry.name in spec.keywords
            }
            because = f"this bundle's {other} network's"
            assumed = [
                replace(entry, value=shared[entry.name], because=because, otherwise=f"--set {entry.name}=...")
                if entry.name in shared
                else entry
                for entry in converted.assumed
            ]
            return replace(converted, keywords={**converted.keywords, **shared}, assumed=assumed)
    return converted


def _published_sampling(kind: str, keywords: Mapping[str, Any]) -> tuple[SamplingConfig, list[Assumed]]:
    """How the authors of such a score network sample from it."""
    if kind == "DiffusersPrecond":
        usual, because = SamplingConfig(solver="ddim", respacing="50"), "diffusers' usual 50 steps of DDIM"
        entries = [Assumed(name, getattr(usual, name), because, f"dgfast sample --{name}") for name in _OF_DIFFUSERS]
        return usual, entries
    authors = "its authors sample so"
    if kind == "FlowPrecond":
        assumed = [Assumed("solver", "flow-sde", authors, "dgfast sample --solver")]
        assumed.append(Assumed("num_steps", _SIT_STEPS, authors, "dgfast sample --steps"))
        return SamplingConfig(solver="flow-sde", num_steps=_SIT_STEPS), assumed
    if kind == "EDM2Precond":
        sampling = SamplingConfig(**presets.SAMPLING)
        return sampling, [
            Assumed("num_steps", sampling.num_steps, "EDM2's", "dgfast sample --steps"),
            Assumed("state_dtype", sampling.state_dtype, "EDM2's", "dgfast sample --state-dtype"),
        ]
    if kind != "DDPMPrecond":
        small = keywords["img_resolution"] < 64
        steps, because = (18, "EDM's for images below 64 px") if small else (40, "EDM's for images of 64 px and more")
        return SamplingConfig(num_steps=steps), [Assumed("num_steps", steps, because, "dgfast sample --steps")]
    chosen: dict[str, tuple[Any, str]] = {"solver": ("ddpm", authors), "respacing": ("250", authors)}
    if keywords["model_type"] != "DiT":
        chosen["clip_denoised"] = True, authors
    if not keywords.get("learn_sigma", True):
        chosen["fixed_variance"] = "large", "it learns none, and its authors' sigma_small is off by default"
    assumed = [
        Assumed(name, value, because, f"dgfast sample --{name.replace('_', '-')}")
        for name, (value, because) in chosen.items()
    ]
    return SamplingConfig(**{name: value for name, (value, _) in chosen.items()}), assumed


# The time that a classifier reads -------------------------------------------------------------------------------------
def classifier_time(bundle: Bundle, image_size: int, told: str | None) -> tuple[str | None, list[Assumed]]:
    """The schedule for a classifier that is to be added to the bundle.

    None leaves it open as long as the bundle has no score network, see `bundle.NetSpec`.
    """
    score = bundle.nets.get("score")
    own = _schedule(score.kind, score.keywords) if score else None
    if told:
        because = f"told, though this bundle's score network has {own}"
        return told, [Assumed("time_schedule", told, because, f"--time-schedule {own}")] if own not in (
            None,
            told,
        ) else []
    usual = own or adm_time_schedule(image_size)
    because = f"ADM's for {image_size} px" + ("" if score else ", until the bundle has a score network with its own")
    other = "linear" if usual == "cosine" else "cosine"
    entry = Assumed(
        "time_schedule", usual, "this bundle's score network's" if own else because, f"--time-schedule {other}"
    )
    return usual if score else None, [entry]


def _of_the_classifier(bundle: Bundle, kind: str, keywords: Mapping[str, Any]) -> list[Assumed]:
    """What a score network says of the time of a classifier that was there before."""
    own, classifier = _schedule(kind, keywords), bundle.nets.get("classifier")
    if own is None or classifier is None or classifier.time_schedule == own:
        return []
    because = f"told when it was converted, though this network has {own}"
    if classifier.time_schedule is None:
        because = "this score network's, which the classifier waited for"
    value = classifier.time_schedule or own
    return [Assumed("classifier's time", value, because, "time_schedule in bundle.json")]


def _schedule(kind: str, keywords: Mapping[str, Any]) -> str | None:
    """The schedule of a score network of discrete time, which a classifier beside it shares; None of any other."""
    return str(keywords.get("noise_schedule", "linear")) if kind == "DDPMPrecond" else None
