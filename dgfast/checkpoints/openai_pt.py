"""State dicts in `.pt` and `.safetensors` files, and the keywords of ADM's networks from their tensors.

OpenAI publishes its score networks and noise-aware classifiers and DG its discriminators as bare state dicts: what they
were built with is told by their shapes, within the few configurations that were ever published.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgfast import nets
from dgfast.bundle import load_state, read_tensors
from dgfast.checkpoints import torch_file
from dgfast.checkpoints.account import Assumed
from dgfast.checkpoints.foreign import file_format
from dgfast.checkpoints.wrappers import StateDict, unwrap
from dgfast.denoiser import PRECONDITIONERS
from dgfast.errors import UserError
from dgfast.nets.adm_unet import PUBLISHED
from dgfast.vp import adm_time_schedule

# OpenAI's 64, 128, 256 and 512, DG's trunk for 32 and its discriminator on 8 x 8 features, each with either depth.
_IMAGE_SIZES = (8, 16, 32, 64, 128, 256, 512)
_DEPTHS = (2, 4)
_SCRIPT_HEADS = 4


def read(path: Path, key: str | None = None) -> StateDict:
    """The tensors of a network, by name. Only tensors and plain values are read, nothing is run.

    Args:
        path: a file of torch.save, or of safetensors, whatever its ending.
        key: the part of the file to take, see `wrappers.unwrap`.

    Raises:
        UserError: unreadable, or something else than dense tensors by name.
    """
    content: object = read_tensors(path) if file_format(path) == "safetensors" else torch_file.read(path)
    return unwrap(content, key, path)


def classifier_keywords(tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("create_classifier", ...)` makes a network for exactly these tensors.

    Width, channels, pooling and the label table are read off the shapes; image size and depth are those of the
    published network that fits. What is `told` is taken as it is.

    Raises:
        UserError: no published network fits; how the nearest one differs, and what to do.
    """
    attention = "out.2.positional_embedding" in tensors
    read_off = {
        "classifier_use_fp16": False,
        "classifier_width": _extent(tensors, "time_embed.0.weight", 1, source),
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention" if attention else "adaptive",
        "out_channels": _extent(tensors, "out.2.c_proj.weight" if attention else "out.3.weight", 0, source),
        "in_channels": _extent(tensors, "input_blocks.0.0.weight", 1, source),
        "condition": "label_emb.weight" in tensors,
    }
    actual = {name: value.shape for name, value in tensors.items()}
    fits: list[tuple[int, dict[str, Any], nn.Module]] = []
    reason = ""
    for size, depth in itertools.product(_IMAGE_SIZES, _DEPTHS):
        keywords = {"image_size": size, "classifier_depth": depth, **read_off, **told}
        try:
            with torch.device("meta"):
                net = nets.build("create_classifier", **keywords)
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # a width that this size cannot have
            reason = str(error)
            continue
        shapes = {name: value.shape for name, value in net.state_dict().items()}
        fits.append((len(shapes.items() ^ actual.items()), keywords, net))
    remedy = "For a network of your own give --kind EncoderUNetModel and its keywords with --set"
    if not fits:
        raise UserError(f"{source} is no published classifier or discriminator: {reason}. {remedy}")
    differences, keywords, net = min(fits, key=lambda fit: fit[0])
    if differences:
        try:
            load_state(net, tensors, source)
        except UserError as error:
            nearest = f"image_size {keywords['image_size']}, classifier_depth {keywords['classifier_depth']}"
            raise UserError(f"{error.message} (the nearest published one, {nearest}). {remedy}") from error
    return keywords


def score_keywords(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: object
) -> tuple[dict[str, Any], list[Assumed]]:
    """Keywords with which `nets.build("DDPMPrecond", ...)` makes OpenAI's score network of exactly these tensors.

    Returns:
        the keywords, and what no shape among them tells.

    Raises:
        UserError: no published network fits; what to do.
    """
    actual = {name: value.shape for name, value in tensors.items()}
    for published, keywords in PUBLISHED.items():
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in nets.build("create_model", **keywords).state_dict().items()}
        if shapes != actual:
            continue
        size, schedule = keywords["image_size"], adm_time_schedule(keywords["image_size"])
        read = {
            "img_resolution": size,
            "img_channels": 3,
            "label_dim": 1000 if keywords["class_cond"] else 0,
            "model_type": "create_model",
            "noise_schedule": schedule,
            **{name: value for name, value in keywords.items() if name not in ("image_size", "class_cond")},
        }
        because = f"its shapes are those of OpenAI's {size} x {size} network, whose other keywords it gets"
        assumed = [
            Assumed("network", published, because, "--kind DDPMPrecond and --set"),
            Assumed("noise_schedule", schedule, f"{published} was trained with it", "--set noise_schedule=..."),
        ]
        return {**read, **told}, [entry for entry in assumed if entry.name not in told]
    adm = "input_blocks.0.0.weight" in tensors
    own = "DDPMPrecond --set model_type=create_model" if adm else f"({', '.join(PRECONDITIONERS)})"
    raise UserError(f"{source} is none of {', '.join(PUBLISHED)}: give --kind {own} and its keywords with --set")


def with_script_defaults(kind: str, told: Mapping[str, Any]) -> tuple[dict[str, Any], list[Assumed]]:
    """The keywords of a network of one's own, and what guided-diffusion's scripts give where its constructor differs.

    That is the number of heads of its U-Net, which no tensor's shape tells.
    """
    own_heads = "num_heads" in told or told.get("num_head_channels", -1) != -1
    if kind != "DDPMPrecond" or told.get("model_type") != "create_model" or own_heads:
        return dict(told), []
    entry = Assumed("num_heads", _SCRIPT_HEADS, "the default of guided-diffusion's scripts", "--set num_heads=...")
    return {**told, "num_heads": _SCRIPT_HEADS}, [entry]


def is_upsampler(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a U-Net of guided-diffusion that also reads an image of lower resolution."""
    first = tensors.get("input_blocks.0.0.weight")
    return (
        first is not None
        and first.dim() == 4
        and first.shape[1] == 6
        and "output_blocks.0.0.in_layers.0.weight" in tensors
    )


def _extent(tensors: Mapping[str, Tensor], name: str, axis: int, source: object) -> int:
    if name not in tensors or tensors[name].dim() <= axis:
        raise UserError(f"{source} is no ADM classifier or discriminator: {name} is missing or misshapen")
    return tensors[name].shape[axis]
