"""The keywords of a DiT from its tensors: all but the number of heads are told by the shapes."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgfast.errors import UserError
from dgfast.nets.dit import PRESETS

_MARK = "x_embedder.proj.weight"


def is_dit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a DiT's tensors, under the names of its own code."""
    return _MARK in tensors


def score_keywords(tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("DDPMPrecond", ...)` makes a denoiser of these tensors.

    The last row of the label table counts as the null class. The number of heads is that of the published network of
    the same width and depth. What is `given` is taken as it is.

    Raises:
        UserError: no DiT, or one of no published size whose `num_heads` is not given.
    """

    def extent(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].dim() <= axis:
            raise UserError(f"{source} is no DiT: {name} is missing or misshapen")
        return tensors[name].shape[axis]

    patch = extent(_MARK, 2)
    channels, width = extent(_MARK, 1), extent(_MARK, 0)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    read_off = {
        "model_type": "DiT",
        "img_resolution": math.isqrt(extent("pos_embed", 1)) * patch,
        "img_channels": channels,
        "label_dim": extent("y_embedder.embedding_table.weight", 0) - 1,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "mlp_ratio": extent("blocks.0.mlp.fc1.weight", 0) / width,
        "learn_sigma": extent("final_layer.linear.weight", 0) == 2 * channels * patch**2,
    }
    heads = {(size["depth"], size["hidden_size"]): size["num_heads"] for size in PRESETS.values()}
    if (depth, width) in heads:
        read_off["num_heads"] = heads[depth, width]
    elif "num_heads" not in given:
        raise UserError(
            f"{source}: no published DiT has {depth} blocks of width {width}, and a file does not tell the number of "
            "heads: give it with --set num_heads=..."
        )
    return read_off | dict(given)
