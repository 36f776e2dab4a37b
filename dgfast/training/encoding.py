"""Pictures beside a network of latents: the bundle's VAE encodes them, once."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.latents import AT_ONCE, NONE, opened
from dgfast.training.data import ImageSet

_SEED = 0


def draws_latents(bundle: Bundle) -> bool:
    """Whether the bundle says that its score network makes latents."""
    return "score" in bundle.nets and bundle.vae is not None and bundle.vae.source != NONE


@torch.no_grad()
def as_latents(pictures: ImageSet, bundle: Bundle, device: torch.device) -> ImageSet:
    """The latents that the score network of a bundle with a VAE learnt from, float32 [N, h, w, C], of pictures.

    Of each picture one sample of the VAE's posterior, times the bundle's scale plus its bias: DiT, SiT and EDM2 train
    on samples too, on new ones in each step.

    Raises:
        UserError: pictures of other sides or channels than the network's latents stand for; no such VAE.
    """
    assert bundle.vae is not None
    keywords = bundle.spec("score").keywords
    channels, side = keywords["img_channels"], keywords["img_resolution"]
    vae, told = opened(bundle, channels, device, bundle.vae.source)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sides = [factor * extent for extent in (side if isinstance(side, tuple | list) else (side, side))]
    read = (*sides, vae.config.in_channels)
    if pictures.images.shape[1:] != read:
        seen, needed = (" x ".join(map(str, shape)) for shape in (pictures.images.shape[1:], read))
        raise UserError(
            f"--data: images of {seen} (height, width, channels); the bundle's latents are of images of {needed}"
        )
    generator = torch.Generator().manual_seed(_SEED)

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(told.shown(pixels.permute(0, 3, 1, 2).to(device))).latent_dist
        return told.scaled(posterior.sample(generator=generator)).permute(0, 2, 3, 1).cpu()

    with tqdm(total=len(pictures), unit="image", desc="encode", dynamic_ncols=True) as bar:
        latents = []
        for part in torch.from_numpy(pictures.images).split(AT_ONCE):
            latents.append(encode(part).numpy())
            bar.update(len(part))
    return ImageSet(np.concatenate(latents), pictures.labels)
