"""EDM2's networks without their snapshot's words: keywords from tensors' shapes, and what a published name says."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dgfast import presets
from dgfast.errors import UserError

_MARK = "unet.emb_noise.weight"
_CONV = re.compile(r"unet\.enc\.(\d+)x\1_conv\.weight")
_BLOCK = re.compile(r"unet\.enc\.(\d+)x\1_block(\d+)\.(conv_res0|attn_proj)\.weight")


def is_edm2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of an EDM2 network, under the names of its own code."""
    return _MARK in tensors


def score_keywords(tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("EDM2Precond", ...)` makes a denoiser of these tensors.

    What no shape shows (balances, channels per head, the clip, the filter, sigma_data) is the constructor's default.
    What is `told` is taken as it is.

    Raises:
        UserError: a layer is missing, or misshapen.
    """
    try:
        first = next(found for found in map(_CONV.fullmatch, tensors) if found)
        blocks = [found for found in map(_BLOCK.fullmatch, tensors) if found]
        width = {int(found[1]): tensors[found[0]].shape[0] for found in blocks if found[3] == "conv_res0"}
        channels = tensors[first[0]].shape[0]
        embedding, noise = tensors[_MARK].shape
        label = tensors.get("unet.emb_label.weight")
        read = {
            "img_resolution": int(first[1]),
            "img_channels": tensors["unet.out_conv.weight"].shape[0],
            "label_dim": 0 if label is None else label.shape[1],
            "model_channels": channels,
            "channel_mult": [_times(width[res], channels) for res in sorted(width, reverse=True)],
            "channel_mult_noise": _times(noise, channels),
            "channel_mult_emb": _times(embedding, channels),
            "num_blocks": 1 + max(int(found[2]) for found in blocks),
            "attn_resolutions": sorted({int(found[1]) for found in blocks if found[3] == "attn_proj"}, reverse=True),
            "logvar_channels": tensors["logvar_linear.weight"].shape[1],
        }
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise UserError(f"{source} is no whole network of EDM2: a layer is missing or misshapen ({error})") from error
    return read | dict(told)


def _times(channels: int, unit: int) -> int:
    if not unit or channels % unit:
        raise ValueError(f"{channels} channels are no multiple of {unit}")
    return channels // unit


def require_own_size(file: Path, kind: str, keywords: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the file has a published name, and holds another network than it says.
    """
    published = presets.named(file.name)
    wrong = published.contradiction(kind, keywords) if published else ""
    if wrong:
        raise UserError(f"{file}: by its name it is one of EDM2's published networks, but it has {wrong}; rename it")
