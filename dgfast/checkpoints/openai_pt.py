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
from dgfast.denoiser import PRECONDITIONERS
from dgfast.errors import UserError
from dgfast.nets.adm_unet import PUBLISHED

# OpenAI's 64, 128, 256 and 512, DG's trunk for 32 and its discriminator on 8 x 8 features, each with either depth.
_IMAGE_SIZES = (8, 16, 32, 64, 128, 256, 512)
_DEPTHS = (2, 4)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, by name. Of a `.pt` file only tensors and plain values are read, nothing is run.

    Raises:
        UserError: unreadable, or something else than dense tensors by name.
    """
    content: object = read_tensors(path) if path.suffix == ".safetensors" else torch_file.read(path)
    if isinstance(content, torch_file.Opaque):
        raise UserError(f"{path} holds a {content.name}, not a state dict: save net.state_dict()")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save net.state_dict()")
    for name, value in content.items():
        if not isinstance(name, str) or not name.isprintable() or not _is_dense(value):
            what = f"{name!r:.80} is not a dense tensor of floats"
            raise UserError(f"{path} is not a bare state dict: {what}. Save net.state_dict()")
    return content


def _is_dense(value: object) -> bool:
    """Whether it is a tensor of floats, and has any: no network has a tensor without, but a shape with 0 may lie."""
    return isinstance(value, Tensor) and value.dtype in _DTYPES and value.numel() > 0


def classifier_keywords(tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("create_classifier", ...)` makes a network for exactly these tensors.

    Width, channels, pooling and the label table are read off the shapes; image size and depth are those of the
    published network that fits. What is `given` is taken as it is.

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
        keywords = {"image_size": size, "classifier_depth": depth, **read_off, **given}
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


def score_keywords(tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Keywords with which `nets.build("DDPMPrecond", ...)` makes OpenAI's score network of exactly these tensors.

    Raises:
        UserError: no published network fits; what to do.
    """
    actual = {name: value.shape for name, value in tensors.items()}
    for keywords in PUBLISHED.values():
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in nets.build("create_model", **keywords).state_dict().items()}
        if shapes == actual:
            own = {name: value for name, value in keywords.items() if name not in ("image_size", "class_cond")}
            return {
                "img_resolution": keywords["image_size"],
                "img_channels": 3,
                "label_dim": 1000 if keywords["class_cond"] else 0,
                "model_type": "create_model",
                "noise_schedule": "cosine" if keywords["image_size"] == 64 else "linear",
                **own,
                **given,
            }
    known = ", ".join(PRECONDITIONERS)
    raise UserError(
        f"{source}: give --kind ({known}) and its keywords with --set; it is none of {', '.join(PUBLISHED)}"
    )


def _extent(tensors: Mapping[str, Tensor], name: str, axis: int, source: object) -> int:
    if name not in tensors or tensors[name].dim() <= axis:
        raise UserError(f"{source} is no ADM classifier or discriminator: {name} is missing or misshapen")
    return tensors[name].shape[axis]
