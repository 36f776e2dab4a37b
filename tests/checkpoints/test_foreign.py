"""What is no checkpoint, or none that is read, is named for what it is, in one line that says what to do."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from dgfast import nets
from dgfast.checkpoints.foreign import file_format
from dgfast.convert import main
from dgfast.errors import UserError


def refused(file: Path, *options: str) -> str:
    """The one line with which a conversion ends."""
    out = file.parent / "bundle"
    result = CliRunner().invoke(main, [str(file), "--role", "score", "--out", str(out), *options])
    assert result.exit_code == 2 and result.output.count("\n") == 1 and not out.exists(), result.output
    assert result.output.startswith(f"Error: {file} "), result.output
    return result.output


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2703132141\n"


@pytest.mark.parametrize("ending", [".pt", ".pkl", ".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(LFS, "a Git LFS pointer and not the file itself: run `git lfs pull`", id="lfs"),
        pytest.param(b"<!DOCTYPE html>\n<html>Sign in</html>", "an HTML page", id="html"),
        pytest.param(b"\n  <HTML><body>404</body>", "an HTML page", id="bare_html"),
        pytest.param(b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML page", id="xml"),
        pytest.param(gzip.compress(b"x"), "an archive: unpack it", id="gzip"),
        pytest.param(b"\x89HDF\r\n\x1a\n", "an HDF5 file", id="keras"),
        pytest.param(b"GGUF\x03", "a GGUF file", id="gguf"),
        pytest.param(b"\xef\xbb\xbf<!-- a page --><html>", "an HTML page", id="html_with_a_comment"),
        pytest.param(b"model.pt".ljust(257, b"\0") + b"ustar\x0000", "an archive: unpack it", id="tar"),
        pytest.param(b'{"error":"Repository not found"}', 'is a text, \'{"error":"Repository not found"}\'', id="json"),
        pytest.param(b"", "is empty: fetch it again", id="empty"),
    ],
)
def test_files_that_hold_no_weights_are_named(tmp_path: Path, ending: str, content: bytes, complaint: str) -> None:
    file = tmp_path / f"x{ending}"
    file.write_bytes(content)
    assert complaint in refused(file)


CONV = (4, 4, 1, 1)
THEIRS = "give the folder of its pipeline, or the .pt of its authors (facebookresearch/DiT) with the same weights"


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        pytest.param(
            ["pos_embed.proj.weight", "transformer_blocks.0.attn1.to_k.weight", "proj_out_1.weight"],
            f"a DiT under the names of diffusers: {THEIRS}", id="diffusers_dit",
        ),
        pytest.param(
            ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"],
            "a U-Net of diffusers", id="diffusers_unet",
        ),
        pytest.param(["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_out.weight"], "a VAE", id="vae"),
        pytest.param(["encoder.down.0.block.0.conv1.weight", "decoder.conv_out.weight"], "a VAE", id="first_vae"),
        pytest.param(["a.lora_A.weight", "b.lora_B.weight"], "a LoRA", id="lora"),
        pytest.param(
            ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out.weight", "betas"],
            "a latent diffusion checkpoint", id="stable_diffusion",
        ),
        pytest.param(
            ["model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight"],
            "a latent diffusion checkpoint", id="stable_diffusion_ema",
        ),
        pytest.param(
            ["out.2.weight", "input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"],
            "a U-Net of latent diffusion", id="stable_diffusion_unet",
        ),
        pytest.param(["emb_noise.weight", "out_conv.weight", "out_gain"], "the raw network of EDM2 alone", id="edm2"),
        pytest.param(["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"], "an MMDiT", id="sd3"),
    ],
)  # fmt: skip
def test_networks_that_are_not_read_are_named_by_their_tensors(
    tmp_path: Path, names: list[str], complaint: str
) -> None:
    tensors = {name: torch.ones(CONV) for name in names}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "x.pt")
    for file in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        assert f"is {complaint}" in refused(file)
        assert f"is {complaint}" in refused(file, "--kind", "EDMPrecond", "--set", "img_resolution=8")


def test_upsamplers_are_named(tmp_path: Path) -> None:
    adm: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8"}
    upsampler = nets.build("create_model", image_size=8, in_channels=6, **adm)
    torch.save(upsampler.state_dict(), tmp_path / "64_256_upsampler.pt")
    told = ["--kind", "DDPMPrecond", "--set", "model_type=create_model", "--set", "img_resolution=8"]
    told += [part for name, value in adm.items() for part in ("--set", f"{name}={value}")]
    for options in ([], [*told, "--set", "img_channels=3"]):
        assert "is an upsampler of guided-diffusion" in refused(tmp_path / "64_256_upsampler.pt", *options)
    options = [*told, "--set", "img_channels=6", "--set", "learn_sigma=false", "--out", str(tmp_path / "six")]
    result = CliRunner().invoke(main, [str(tmp_path / "64_256_upsampler.pt"), "--role", "score", *options])
    assert result.exit_code == 0, "images of six channels are none of our business: " + result.output


# Folders --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("description", "content", "complaint"),
    [
        pytest.param("model_index.json", {"_class_name": "DiTPipeline"}, f"does not read so: {THEIRS}", id="pipeline"),
        pytest.param("config.json", {"_class_name": "UNet1DModel"}, "diffusers' UNet1DModel, which", id="unet"),
        pytest.param("config.json", {"_class_name": "AutoencoderKL"}, "name its folder with --vae", id="vae"),
        pytest.param("config.json", {"_class_name": 5}, "a folder without checkpoints", id="odd"),
        pytest.param("config.json", [], "a folder without checkpoints", id="list"),
        pytest.param("bundle.json", {}, "a bundle already: python -m dgfast.sample --bundle", id="bundle"),
    ],
)
def test_folders_are_named_for_what_they_are(tmp_path: Path, description: str, content: Any, complaint: str) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / description).write_text(json.dumps(content))
    assert complaint in refused(folder)


def test_files_of_diffusers_are_named_by_the_description_beside_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"x": torch.ones(2)}, file)
    assert "is diffusers' PixArtTransformer2DModel, which dgfast does not read" in refused(file)


def test_a_folder_names_the_checkpoints_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{" * 100_000)
    assert "is a folder without checkpoints" in refused(folder)
    for name in ("b.safetensors", *(f"a{i}.pt" for i in range(6)), "notes.txt"):
        (folder / name).touch()
    assert "give one of its files (a0.pt, a1.pt, a2.pt, a3.pt, a4.pt and 2 more)" in refused(folder)


def test_parts_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model-00002-of-00003.safetensors"
    save_file({"x": torch.ones(2)}, file)
    assert "is part 2 of 3 of a checkpoint: join them" in refused(file)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(UserError, match="a pipe or a device"):
        file_format(tmp_path / "x.pt")


# Right content, wrong ending ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", [".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".pkl", ".safetensors"])
def test_the_first_bytes_tell_the_format_not_the_ending(tmp_path: Path, ending: str) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / f"torch{ending}")
    save_file({"x": torch.ones(2)}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / f"x{ending}")
    assert (file_format(tmp_path / f"torch{ending}"), file_format(tmp_path / f"x{ending}")) == ("torch", "safetensors")


def test_a_pickle_is_a_snapshot_by_its_ending(own_golden_folder: Path, tmp_path: Path) -> None:
    assert file_format(own_golden_folder / "edm_tiny.pkl") == "snapshot"
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert file_format(tmp_path / "old.pt") == "torch"
