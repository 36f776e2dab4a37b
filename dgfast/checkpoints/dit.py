"""The keywords of a DiT, or a SiT, from its tensors.

Shapes tell all but its heads, whether its labels have a null class, and which of the two it is: SiT has DiT's tensors
under DiT's names. Only REPA's (arXiv 2410.06940) tell themselves, by the projector heads of their training.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgfast.checkpoints.account import Assumed
from dgfast.errors import UserError
from dgfast.nets.dit import PRESETS

_MARK = "x_embedder.proj.weight"
_PROJECTOR = "projectors."
_LATER_BLOCK = "decoder_blocks."
_LABELS = "y_embedder.embedding_table.weight"


def is_dit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a DiT's tensors, under the names of its own code."""
    return _MARK in tensors


def without_training_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """What sampling needs of these tensors, and whether they are REPA's.

    Its projectors are left out. Its first checkpoints count the blocks above the projectors anew; here they go on.
    """
    if not any(name.startswith(_PROJECTOR) for name in tensors):
        return dict(tensors), False
    below = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(_LATER_BLOCK):
            number, _, rest = name.removeprefix(_LATER_BLOCK).partition(".")
            name = f"blocks.{below + int(number)}.{rest}" if re.fullmatch(r"\d{1,4}", number, re.ASCII) else name
        if not name.startswith(_PROJECTOR):
            own[name] = value
    return own, True


def kind_and_keywords(
    tensors: Mapping[str, Tensor], kind: str | None, told: Mapping[str, Any], repa: bool, source: object
) -> tuple[str, dict[str, Any], list[Assumed]]:
    """The preconditioner of these tensors, its keywords, and what they assume.

    Args:
        kind: as told. repa: they are, see `without_training_parts`.

    Raises:
        UserError: see `score_keywords`.
    """
    model_type = told.get("model_type", "SiT" if repa or kind == "FlowPrecond" else "DiT")
    kind = "FlowPrecond" if model_type == "SiT" else "DDPMPrecond"
    keywords, assumed = score_keywords(tensors, {"model_type": model_type, **told}, source)
    if model_type == "DiT" and "model_type" not in told:
        assumed.append(Assumed("model_type", "DiT", "SiT's tensors have the same names", "--set model_type=SiT"))
    if repa and "toward_noise" not in told:
        keywords["toward_noise"] = True
        because = "its projectors are REPA's, whose time runs so"
        assumed.append(Assumed("toward_noise", True, because, "--set toward_noise=false"))
    return kind, keywords, assumed


def score_keywords(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: object
) -> tuple[dict[str, Any], list[Assumed]]:
    """Keywords with which `nets.build` makes a denoiser of these tensors, and what they assume.

    The number of heads is that of the published network of the same width and depth. What is `told` is taken as it is.

    Raises:
        UserError: no DiT, or one of no published size whose `num_heads` is not told.
    """
    channels, width, patch = (_extent(tensors, _MARK, axis, source) for axis in (1, 0, 2))
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    read = {
        "model_type": "DiT",
        "img_resolution": math.isqrt(_extent(tensors, "pos_embed", 1, source)) * patch,
        "img_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "mlp_ratio": _extent(tensors, "blocks.0.mlp.fc1.weight", 0, source) / width,
        "learn_sigma": _extent(tensors, "final_layer.linear.weight", 0, source) == 2 * channels * patch**2,
    }
    labels, assumed_labels = _labels(_extent(tensors, _LABELS, 0, source), told, source)
    heads, assumed_heads = _heads(depth, width, told, source)
    return read | labels | heads | dict(told), assumed_heads + assumed_labels


def _labels(rows: int, told: Mapping[str, Any], source: object) -> tuple[dict[str, Any], list[Assumed]]:
    """The classes in a label table, whose last row stands for "no class" if classes were dropped in training."""
    dropout, assumed = told.get("class_dropout_prob"), list[Assumed]()
    if isinstance(dropout, int | float):
        null_class = dropout > 0
    elif "label_dim" in told:
        null_class = told["label_dim"] != rows
    else:
        null_class = rows > 1
        because = f'label row {rows:,} of {rows:,} is "no class"' if null_class else "one label row is one class"
        value, otherwise = ("above 0", "--set class_dropout_prob=0") if null_class else (0, "")
        assumed = [Assumed("class_dropout_prob", value, because, otherwise)]
    if rows == 1 and null_class:
        raise UserError(
            f"{source}: its label table has one row, which leaves no class beside a null class: "
            "leave out --set class_dropout_prob and label_dim"
        )
    return {"label_dim": rows - null_class} | ({} if null_class else {"class_dropout_prob": 0.0}), assumed


def _heads(
    depth: int, width: int, told: Mapping[str, Any], source: object
) -> tuple[dict[str, Any], list[Assumed]]:  # fmt: skip
    if "num_heads" in told:
        return {}, []
    published = {(size["depth"], size["hidden_size"]): size["num_heads"] for size in PRESETS.values()}
    if (depth, width) not in published:
        raise UserError(
            f"{source}: no published DiT has {depth} blocks of width {width}, and a file does not tell the number of "
            "heads: give it with --set num_heads=..."
        )
    heads = published[depth, width]
    because = "the published DiT of this width and depth has as many"
    return {"num_heads": heads}, [Assumed("num_heads", heads, because, "--set num_heads=...")]


def _extent(tensors: Mapping[str, Tensor], name: str, axis: int, source: object) -> int:
    if name not in tensors or tensors[name].dim() <= axis:
        raise UserError(f"{source} is no DiT: {name} is missing or misshapen")
    return tensors[name].shape[axis]
