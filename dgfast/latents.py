"""Latents and images: diffusers' `AutoencoderKL`, of the extra `[latent]`, and how a bundle scales its latents."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgfast.errors import UserError
from dgfast.extras import how_to_install
from dgfast.outputs import as_pixels

if TYPE_CHECKING:
    from dgfast.bundle import Bundle

SCALE = 0.18215
"""What Stable Diffusion's and DiT's latents were multiplied by, to about unit variance (arXiv 2112.10752)."""

Decode = Callable[[Tensor], Tensor]

AT_ONCE = 8
"""Images in a VAE: its activations are their size at 128 channels, so a batch of latents is no batch of images."""
IMAGE_CHANNELS = (1, 3)
RANGES = ("signed", "unit")


@dataclass(frozen=True)
class VaeSpec:
    """What decodes the latents that the score network makes, and how those were made of what it reads.

    Attributes:
        source: an `AutoencoderKL` as diffusers saves it: a folder, seen from the bundle's or from here, or a hub name.
        scale, bias: latents are the VAE's times scale plus bias; one number, or one a channel.
        pixels: in which range it was shown images, "signed" [-1, 1], or "unit" [0, 1] as by EDM2; "unit" pixels are cut
            off to whole numbers, as its code does.
    """

    source: str
    scale: float | tuple[float, ...] = SCALE
    bias: float | tuple[float, ...] = 0.0
    pixels: str = "signed"

    def __post_init__(self) -> None:
        for name in ("scale", "bias"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        named = isinstance(self.source, str) and self.source and self.source.isprintable()
        if not named or not all(0 < one < math.inf for one in _listed(self.scale)):
            raise UserError(
                f"vae: source {self.source!r:.80} must be a folder or name, scale {self.scale!r:.80} a number above 0, "
                "or one a channel"
            )
        if not all(map(math.isfinite, _listed(self.bias))) or self.pixels not in RANGES:
            raise UserError(f"vae: bias {self.bias!r:.80} must be finite, pixels {self.pixels!r:.80} signed or unit")

    def described(self) -> dict[str, Any]:
        """As plain data, without what is as usual."""
        usual = {"bias": 0.0, "pixels": "signed"}
        return {name: value for name, value in asdict(self).items() if value != usual.get(name, ())}

    def raw(self, latents: Tensor) -> Tensor:
        """The VAE's own latents of the score network's [B, C, h, w].

        Raises:
            UserError: another number of channels.
        """
        scale, bias = self._affine(latents)
        return (latents - bias) / scale

    def scaled(self, raw: Tensor) -> Tensor:
        """What the score network reads, of the VAE's own latents [B, C, h, w].

        Raises:
            UserError: another number of channels.
        """
        scale, bias = self._affine(raw)
        return raw * scale + bias

    def _affine(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        for name in ("scale", "bias"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != latents.shape[1]:
                raise UserError(f"vae: {name} has {len(value)} numbers, latents have {latents.shape[1]} channels")
        scale, bias = (latents.new_tensor(_listed(value)).view(1, -1, 1, 1) for value in (self.scale, self.bias))
        return scale, bias

    def as_pixels(self, decoded: Tensor) -> Tensor:
        """What the VAE returns, [B, 3, H, W], as uint8."""
        if self.pixels == "unit":
            return (decoded.float().clamp(0, 1) * 255).to(torch.uint8)
        return as_pixels(decoded)

    def shown(self, pixels: Tensor) -> Tensor:
        """uint8 pixels of any shape as the VAE is shown them."""
        return pixels.float() / 255 if self.pixels == "unit" else pixels.float() / 127.5 - 1


def _listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


NONE = "none"
"""In the place of a VAE: what is drawn are pixels, however many channels they have."""


def decoder(bundle: "Bundle", channels: int, device: torch.device, source: str | None = None) -> Decode | None:
    """A function of latents [B, C, h, w] -> pixels uint8 [B, 3, f h, f w]; None for a bundle of images.

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
    vae, told = opened(bundle, channels, device, source)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = told.raw(latents.float()).split(AT_ONCE)
        return torch.cat([told.as_pixels(vae.decode(part).sample) for part in parts])

    return decode


def opened(bundle: "Bundle", channels: int, device: torch.device, source: str) -> tuple[Any, VaeSpec]:
    """The frozen `AutoencoderKL` of that folder, seen from the bundle's or from here, or of that hub name.

    Returns:
        it, and what the bundle says of its latents.

    Raises:
        UserError: diffusers missing, no VAE there, one for latents of another number of channels.
    """
    inside = bundle.folder / source
    vae = _load(inside if inside.is_dir() else Path(source) if Path(source).is_dir() else source)
    if vae.config.latent_channels != channels:
        raise UserError(
            f"the VAE {source} decodes latents of {vae.config.latent_channels} channels, "
            f"the score network of bundle {bundle.name} makes {channels}"
        )
    told = bundle.vae or VaeSpec(source)
    told.raw(torch.empty(1, channels, 1, 1))
    return vae.eval().requires_grad_(False).to(device), told


def _load(source: Path | str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"a VAE needs diffusers ({error}): {how_to_install('diffusers')}") from error
    try:
        from_pretrained: Any = AutoencoderKL.from_pretrained  # which diffusers leaves untyped
        return from_pretrained(source, use_safetensors=True)  # its other format can run code
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"VAE {source}: no AutoencoderKL with safetensors weights there ({reason})") from error
