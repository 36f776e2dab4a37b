"""The keywords of a DiT from its tensors: all but the number of heads are told by the shapes."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgfast.errors import UserError
from dgfast.nets.dit import PRESETS


def dit_keywords(tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("DiT", ...)` makes a network for these tensors, as DiT's own code names them.

    The last row of the label table counts as the null class. The number of heads is that of the published network of
    the same width and depth. What is `given` is taken as it is.

    Raises:
        UserError: no DiT, or one of no published size whose `num_heads` is not given.
    """

    def extent(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].dim() <= axis:
            raise UserError(f"{source} is no DiT: {name} is missing or misshapen")
        return tensors[name].shape[axis]

    patch = extent("x_embedder.proj.weight", 2)
    channels, width = extent("x_embedder.proj.weight", 1), extent("x_embedder.proj.weight", 0)
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    read_off = {
        "input_size": math.isqrt(extent("pos_embed", 1)) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "mlp_ratio": extent("blocks.0.mlp.fc1.weight", 0) / width,
        "num_classes": extent("y_embedder.embedding_table.weight", 0) - 1,
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
