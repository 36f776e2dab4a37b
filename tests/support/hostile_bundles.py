"""Hostile bundles by hand, see `hostile_files`."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import safetensors.torch

from dgfast import nets
from tests.support.hostile_pickles import ATTACKS, attack

DIT: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_type": "DiT", "patch_size": 2, "hidden_size": 16,
    "depth": 1, "num_heads": 2,
}  # fmt: skip
UNET: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip


def _bundle(folder: Path, keywords: dict[str, Any], weights: bytes, **changes: Any) -> Path:
    kind = "DDPMPrecond" if keywords.get("model_type") == "DiT" else "EDMPrecond"
    spec = {"kind": kind, "keywords": keywords, "file": "score.safetensors"}
    raw: dict[str, Any] = {"format": 1, "name": "x", "nets": {"score": spec}} | changes
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "bundle.json").write_text(json.dumps(raw))
    (bundle / "score.safetensors").write_bytes(weights)
    return bundle


def _weights(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _honest(keywords: dict[str, Any]) -> bytes:
    kind = "DDPMPrecond" if keywords.get("model_type") == "DiT" else "EDMPrecond"
    return safetensors.torch.save(nets.build(kind, **keywords).state_dict())


@attack
def _tensor_without_elements(folder: Path) -> Path:
    """23 KB, and a network whose position table has 16,777,216 rows."""
    empty = {"dtype": "F32", "shape": [1, 16777216, 0], "data_offsets": [0, 0]}
    header = {"model.pos_embed": empty, "__metadata__": {"a": "a" * 22_000}}
    return _bundle(folder, DIT | {"img_resolution": 8192, "hidden_size": 64}, _weights(header))


@attack
def _header_of_brackets(folder: Path) -> Path:
    return _bundle(folder, UNET, _weights({"a": [[]] * 2_600_000}))


@attack
def _header_of_small_tensors(folder: Path) -> Path:
    entry = {"dtype": "U8", "shape": [1]}
    header = {f"{i:x}": entry | {"data_offsets": [i, i + 1]} for i in range(100_000)}
    return _bundle(folder, UNET, _weights(header, bytes(100_000)))


@attack
def _long_shape(folder: Path) -> Path:
    entry = {"dtype": "F32", "shape": [1] * 900_000, "data_offsets": [0, 4]}
    return _bundle(folder, UNET, _weights({"a": entry}, bytes(4)))


def _keywords_attack(name: str, keywords: dict[str, Any], base: dict[str, Any] = UNET) -> None:
    ATTACKS[f"keywords_{name}"] = lambda folder: _bundle(folder, base | keywords, _honest(base))


_keywords_attack("model_channels", {"model_channels": 10**7})
_keywords_attack("num_blocks", {"num_blocks": 10**6})
_keywords_attack("fewer_blocks", {"num_blocks": 10**5})
_keywords_attack("resolution", {"img_resolution": 2**40})
_keywords_attack("text_times", {"model_channels": "a" * 100, "channel_mult_emb": 10**10})
_keywords_attack("list", {"channel_mult": [1] * 10**6})
_keywords_attack("filter", {"resample_filter": list(range(1, 60_000))})
_keywords_attack("nested", {"channel_mult": [[[[1]]]]})
_keywords_attack("depth_of_dit", {"depth": 10**6}, DIT)
_keywords_attack("width_of_dit", {"hidden_size": 10**5}, DIT)
_keywords_attack("positions_of_dit", {"img_resolution": 2**20}, DIT)
_keywords_attack("noise_levels", {"steps": 10**10}, DIT)
_keywords_attack("zero", {"hidden_size": 0}, DIT)


def _settings_attack(name: str, /, **changes: Any) -> None:
    ATTACKS[f"settings_{name}"] = lambda folder: _bundle(folder, UNET, _honest(UNET), **changes)


_settings_attack("num_steps", sampling={"num_steps": 10**9})
_settings_attack("M", sampling={"M": 10**9, "discretization": "iddpm"})
_settings_attack("schedule", guidance={"dg_schedule": [[0, 1]] * 200_000})
_settings_attack("names", name="\x1b[2J\x1b[1;1H")
_settings_attack("metrics", metrics={"a": [[]] * 2_000_000})


@attack
def _nested_json(folder: Path) -> Path:
    bundle = _bundle(folder, UNET, _honest(UNET))
    (bundle / "bundle.json").write_text("[" * 4_000_000)
    return bundle


@attack
def _long_json(folder: Path) -> Path:
    bundle = _bundle(folder, UNET, _honest(UNET))
    (bundle / "bundle.json").write_text("[" + "[]," * 30_000_000 + "[]]")
    return bundle


@attack
def _pipe_as_weights(folder: Path) -> Path:
    bundle = _bundle(folder, UNET, b"")
    (bundle / "score.safetensors").unlink()
    os.mkfifo(bundle / "score.safetensors")
    return bundle


@attack
def _device_as_weights(folder: Path) -> Path:
    bundle = _bundle(folder, UNET, b"")
    (bundle / "score.safetensors").unlink()
    (bundle / "score.safetensors").symlink_to("/dev/zero")
    return bundle


@attack
def _pipe_as_json(folder: Path) -> Path:
    bundle = _bundle(folder, UNET, b"")
    (bundle / "bundle.json").unlink()
    os.mkfifo(bundle / "bundle.json")
    return bundle
