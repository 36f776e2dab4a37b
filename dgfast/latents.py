"""Latents to images: the decoder of diffusers' `AutoencoderKL`, which the extra `[latent]` installs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.extras import how_to_install

if TYPE_CHECKING:
    from dgfast.bundle import Bundle

SCALE = 0.18215
"""What Stable Diffusion's and DiT's latents were multiplied by, to about unit variance (arXiv 2112.10752)."""

Decode = Callable[[Tensor], Tensor]

_AT_ONCE = 8  # a decoder's activations are the images' size at 128 channels: a batch of latents is no batch of images
IMAGE_CHANNELS = (1, 3)
NONE = "none"
"""In the place of a VAE: what is drawn are pixels, however many channels they have."""


def decoder(bundle: "Bundle", channels: int, device: torch.device, source: str | None = None) -> Decode | None:
    """A function of latents [B, C, H, W] -> images [B, 3, f H, f W] in about [-1, 1]; None for a bundle of images.

    Args:
        channels: how many the bundle's score network makes. Other than 1 and 3, they are latents, unless the bundle or
            `source` says `NONE`.
        source: folder or hub name of another VAE than the bundle's own.

    Raises:
        UserError: latents without a VAE, diffusers missing, no VAE there, one for latents of other channels.
    """
    spec = bundle.vae
    source = source or (spec.source if spec else None)
    if source == NONE or (source is None and channels in IMAGE_CHANNELS):
        return None
    if source is None:
        raise UserError(
            f"bundle {bundle.name} makes latents of {channels} channels and has no VAE to decode them: "
            "name one with --vae, a folder or a hub name such as stabilityai/sd-vae-ft-mse; "
            f"or --vae {NONE}, if they are pixels"
        )
    inside = bundle.folder / source
    vae = _load(inside if inside.is_dir() else Path(source) if Path(source).is_dir() else source)
    if vae.config.latent_channels != channels:
        raise UserError(
            f"the VAE {source} decodes latents of {vae.config.latent_channels} channels, "
            f"the score network of bundle {bundle.name} makes {channels}"
        )
    vae.eval().requires_grad_(False).to(device)
    scale = spec.scale if spec else SCALE

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = (latents.float() / scale).split(_AT_ONCE)
        return torch.cat([vae.decode(part).sample for part in parts])

    return decode


def _load(source: Path | str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"decoding latents needs diffusers ({error}): {how_to_install('diffusers')}") from error
    try:
        from_pretrained: Any = AutoencoderKL.from_pretrained  # which diffusers leaves untyped
        return from_pretrained(source, use_safetensors=True)  # its other format can run code
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--vae {source}: no AutoencoderKL with safetensors weights there ({reason})") from error
