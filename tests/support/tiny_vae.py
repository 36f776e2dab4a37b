"""An `AutoencoderKL` of diffusers with random weights: images 3 x 2h x 2w, latents 4 x h x w."""

import warnings
from typing import Any

import torch

with warnings.catch_warnings():  # diffusers and what it imports warn about each other
    warnings.simplefilter("ignore")
    from diffusers import AutoencoderKL


def tiny_vae() -> Any:
    torch.manual_seed(0)
    kind: Any = AutoencoderKL  # diffusers leaves it unannotated
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
