"""Files that are taken for checkpoints and are none, or none that is read: each is named for what it is.

What diffusers, Stable Diffusion and others save are networks that dgfast does not have, or has under other names. Of
those a complaint about keywords would send people after some that cannot fit.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from dgfast.bounds import open_file, read_json
from dgfast.checkpoints import one_line
from dgfast.errors import UserError

SUFFIXES = (".pkl", ".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors")  # .tar of a .pth.tar, which is none
_HEAD = 512  # bytes at the beginning that tell what a file is
_HEADS = (
    (rb"version https://git-lfs", "a Git LFS pointer and not the file itself: run `git lfs pull` where it comes from"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype |!--|html)",
        "an HTML page, such as a login or an error: download the file itself",
    ),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML page, such as a storage service's error: download the file itself"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|(?s:.{257})ustar", "an archive: unpack it, and give the file that is in it"),
    (rb"\x89HDF", "an HDF5 file; those of PyTorch and safetensors are read"),
    (rb"GGUF", "a GGUF file of quantised weights; those of PyTorch and safetensors are read"),
)
_THEIRS = "give the folder of its pipeline, or the .pt of its authors (facebookresearch/DiT) with the same weights"
_FOLDER = "give its folder"
_CLASSES = {
    "DiTTransformer2DModel": _THEIRS, "DiTPipeline": _THEIRS, "UNet2DModel": _FOLDER, "DDPMPipeline": _FOLDER,
    "AutoencoderKL": "name its folder with --vae",
}  # fmt: skip
"""What to do about diffusers' classes, by their names."""
# What tensors' names tell: patterns with a blank between, all of which must be among them, and what that is.
_NAMES = (
    (r"^transformer_blocks\.\d+\.attn1\. ^pos_embed\.proj\.", f"a DiT under the names of diffusers: {_THEIRS}"),
    (r"^(encoder|decoder)\.(down|up)(_blocks)?\. ^decoder\.conv_out\.", "a VAE: name its folder with --vae"),
    (r"^down_blocks\. ^conv_in\.", "a U-Net of diffusers: of an unconditional one give the folder of its pipeline"),
    (r"\.lora_|\.lora\.", "a LoRA, which changes another network: merge them first, and give the result"),
    (r"^(diffusion_model|first_stage_model)", "a latent diffusion checkpoint, whose U-Net dgfast does not have"),
    (r"^input_blocks\.\d+\.\d+\.transformer_blocks\.", "a U-Net of latent diffusion, which dgfast does not have"),
    (r"^emb_noise\.", "the raw network of EDM2 alone: save the state dict of its Precond, which has logvar_linear too"),
    (r"^lvl_embed\. ^word_embed\.", "a VAR, which predicts tokens and no score: dgfast does not have it"),
    (r"^(joint|double)_blocks\.", "an MMDiT (Stable Diffusion 3, FLUX), which dgfast does not have"),
)


def file_format(path: Path) -> str:
    """What kind of file of weights it is, by its first bytes: "snapshot" (of EDM or EDM2), "safetensors" or "torch".

    Raises:
        UserError: a folder, or a file whose name, neighbours or first bytes say that it is none.
    """
    if path.is_dir():
        raise UserError(f"{path} is {_folder(path)}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; use {', '.join(SUFFIXES)}")
    if part := re.search(r"-0*(\d+)-of-0*(\d+)\.", path.name):
        raise UserError(f"{path} is part {part[1]} of {part[2]} of a checkpoint: join them into one file")
    if path.name.startswith("diffusion_pytorch_model") and (name := _class_name(path.with_name("config.json"))):
        raise UserError(f"{path} is {_of_diffusers(name)}")
    with open_file(path) as file:
        head = file.read(_HEAD)
    if not head:
        raise UserError(f"{path} is empty: fetch it again")
    for pattern, what in _HEADS:
        if re.match(pattern, head, re.IGNORECASE):
            raise UserError(f"{path} is {what}")
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        raise UserError(f"{path} is a text, {one_line(head.decode(), most=40)!r} ...: download the file itself")
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if path.suffix == ".safetensors" or head[4:9] == b"\0\0\0\0{":  # the upper half of the length of a JSON header
        return "safetensors"
    return "snapshot" if path.suffix == ".pkl" else "torch"


def require_own_names(names: Iterable[str], path: Path) -> None:
    """
    Raises:
        UserError: tensors of a network that is known, but not to dgfast.
    """
    names = list(names)
    for patterns, what in _NAMES:
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns.split(" ")):
            raise UserError(f"{path} is {what}")


def _folder(folder: Path) -> str:
    if (folder / "bundle.json").is_file():
        return f"a bundle already: python -m dgfast.sample --bundle {folder}"
    for description in ("model_index.json", "config.json"):
        if name := _class_name(folder / description):
            return _of_diffusers(name)
    files = sorted(file.name for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
    if not files:
        return f"a folder without checkpoints: give a file ({', '.join(SUFFIXES)})"
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"a folder: give one of its files ({one_line(', '.join(files[:5]))}{more})"


def _of_diffusers(name: str) -> str:
    return f"diffusers' {name}, which dgfast does not read" + (f" so: {_CLASSES[name]}" if name in _CLASSES else "")


def _class_name(description: Path) -> str:
    """Which class of diffusers a JSON file describes; "" if none."""
    try:
        content = read_json(description)
    except ValueError:  # a UserError, where there is none, is one too
        return ""
    name = content.get("_class_name") if isinstance(content, dict) else None
    return one_line(name, most=80) if isinstance(name, str) else ""
