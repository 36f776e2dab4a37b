"""Score networks of diffusers, built by its own classes, which the extra `[latent]` installs."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dgfast.denoiser.diffusers import DiffusersPrecond
from dgfast.errors import UserError
from dgfast.extras import how_to_install

MODELS = ("UNet2DModel", "DiTTransformer2DModel")
"""Classes of diffusers that are score networks here."""
_OURS = ("sample_size", "in_channels", "num_class_embeds", "num_embeds_ada_norm")  # which other keywords say
_NEEDED = {"class_embed_type": None, "time_embedding_type": "positional", "norm_type": "ada_norm_zero"}
_MOST_PATCHES = 256  # a side: the positions of a DiT are no weights, and nothing else bounds their memory


class FromDiffusers(nn.Module):
    """(x [B, C, H, W], timesteps [B], class indices [B] or None) -> what the network predicts, [B, C or 2 C, H, W].

    Attributes:
        null_class: index of the class that means none; None where there is none.
    """

    def __init__(self, model: nn.Module, null_class: int | None) -> None:
        super().__init__()
        self.model, self.null_class = model, null_class

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        return self.model(x, timesteps, class_labels=class_labels, return_dict=False)[0]


def model_class(name: str) -> Any:
    """The class of diffusers of that name, one of `MODELS`.

    Raises:
        UserError: diffusers is missing. ValueError: no such network here.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model_type {name!r:.80}; known: {', '.join(MODELS)}")
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{name} needs diffusers ({error}): {how_to_install('diffusers')}") from error
    return getattr(diffusers, name)


def build(
    *, model_type: str, img_resolution: int | list[int], img_channels: int, label_dim: int = 0, **keywords: Any
) -> DiffusersPrecond:
    """A network of diffusers, randomly initialised, in its preconditioner.

    Args:
        model_type: one of `MODELS`. keywords: of its constructor, and of `DiffusersPrecond`.

    Raises:
        UserError: diffusers is missing. ValueError: a keyword that is unknown, or beyond what is built.
    """
    size = _size(img_resolution)
    own = {k: keywords.pop(k) for k in inspect.signature(DiffusersPrecond).parameters if k in keywords}
    made, is_dit = model_class(model_type), model_type == MODELS[1]
    known = inspect.signature(made.__init__).parameters.keys() - {*_OURS, "self"}
    if unknown := keywords.keys() - known:
        raise ValueError(f"{model_type} has no keyword {min(unknown)!r:.80}")
    if is_dit:
        if isinstance(size, tuple) or size > _MOST_PATCHES * keywords.get("patch_size", 2):
            raise ValueError(
                f"{model_type} of images {size}: they must be square, of at most {_MOST_PATCHES}^2 patches"
            )
        _require_multiple(size, keywords.get("patch_size", 2))
        raw = made(sample_size=size, in_channels=img_channels, num_embeds_ada_norm=label_dim, **keywords)
    else:
        raw = made(sample_size=size, in_channels=img_channels, num_class_embeds=label_dim or None, **keywords)
        _require_multiple(size, 2 ** (len(raw.down_blocks) - 1))
    return DiffusersPrecond(FromDiffusers(raw, label_dim if is_dit else None), size, img_channels, label_dim, **own)


def keywords_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved network's configuration says, as keywords of `build`; the constructor's defaults are left out.

    Raises:
        UserError: diffusers is missing, or a network that is called otherwise than by time and class.
    """
    parameters = inspect.signature(model_class(name).__init__).parameters
    usual = {key: _plain(one.default) for key, one in parameters.items() if one.default is not one.empty}
    said = usual | {key: _plain(value) for key, value in config.items() if key in usual}
    for key, needed in _NEEDED.items():
        if key in said and said[key] != needed:
            raise UserError(f"{name} with {key} {said[key]!r:.40}: dgfast reads those with {needed}")
    classes = said["num_embeds_ada_norm" if name == MODELS[1] else "num_class_embeds"]
    keywords = {"model_type": name, "img_channels": said["in_channels"], "label_dim": classes or 0}
    if said["sample_size"] is not None:
        keywords["img_resolution"] = said["sample_size"]
    return keywords | {key: value for key, value in said.items() if key not in _OURS and value != usual[key]}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _require_multiple(size: int | tuple[int, int], unit: int) -> None:
    """
    Raises:
        ValueError: a side that the network cannot halve so often, or cut into patches.
    """
    sides = [size] if isinstance(size, int) else size
    if any(side % unit for side in sides):
        raise ValueError(f"img_resolution {size}: the network takes sides that are multiples of {unit}")


def _size(resolution: int | list[int]) -> int | tuple[int, int]:
    """
    Raises:
        ValueError: it is neither one whole number nor height and width.
    """
    sides = [resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"img_resolution {resolution!r:.40} must be a whole number, or height and width")
    return sides[0] if len({*sides}) == 1 else (sides[0], sides[1])
