"""Pictures beside a network of latents, against diffusers' own encoding, and a discriminator that learns from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle, VaeSpec
from dgfast.errors import UserError
from dgfast.latents import AT_ONCE
from dgfast.sample import main as sample
from dgfast.train import main as train
from dgfast.training.data import ImageSet
from dgfast.training.encoding import as_latents, draws_latents
from tests.support.tiny_vae import tiny_vae

_CPU = torch.device("cpu")
_SCORE = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 2, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_COUNT = AT_ONCE + 12


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae()


@pytest.fixture
def bundle(tmp_path: Path, vae: Any) -> Bundle:
    """A bundle of latents 4 x 8 x 8 for images 3 x 16 x 16, its VAE in a folder beside the network."""
    torch.manual_seed(1)
    made = Bundle(tmp_path / "latent", "latent", {}, vae=VaeSpec("vae", 0.5))
    bundles.write(made := bundles.with_net(made, "score", nets.build("EDMPrecond", **_SCORE), "EDMPrecond", _SCORE))
    vae.save_pretrained(made.folder / "vae")
    return made


def pictures(side: int = 16, channels: int = 3) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (_COUNT, side, side, channels), dtype=np.uint8)
    return ImageSet(pixels, np.arange(_COUNT) % 2)


@pytest.mark.parametrize(
    "spec",
    [VaeSpec("vae", 0.18215), VaeSpec("vae", (0.5, 1.0, 2.0, 4.0), (0.1, 0.0, -0.3, 0.2), "unit")],
    ids=["stable-diffusion", "edm2"],
)
def test_pictures_become_what_diffusers_samples_of_them(bundle: Bundle, vae: Any, spec: VaeSpec) -> None:
    images = pictures()
    latents = as_latents(images, replace(bundle, vae=spec), _CPU)
    x = torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 255
    x = x if spec.pixels == "unit" else 2 * x - 1
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in x.split(AT_ONCE)])
    scale, bias = (torch.tensor(value).view(1, -1, 1, 1) for value in (spec.scale, spec.bias))
    assert latents.images.shape == (_COUNT, 8, 8, 4) and latents.images.dtype == np.float32
    assert torch.allclose(latents.tensors()[0], drawn * scale + bias, atol=1e-5)
    assert np.array_equal(latents.labels, images.labels)


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (16, 1)])
def test_pictures_that_the_latents_do_not_stand_for_are_refused(bundle: Bundle, side: int, channels: int) -> None:
    with pytest.raises(UserError, match="the bundle's latents are of images of 16 x 16 x 3"):
        as_latents(pictures(side, channels), bundle, _CPU)


def test_bundle_of_pixels_encodes_nothing(bundle: Bundle) -> None:
    assert draws_latents(bundle)
    assert not draws_latents(replace(bundle, vae=None)) and not draws_latents(replace(bundle, nets={}))
    assert not draws_latents(replace(bundle, vae=VaeSpec("none")))


def test_discriminator_of_latents_learns_from_pictures_and_guides(bundle: Bundle, tmp_path: Path) -> None:
    for index, (image, label) in enumerate(zip(pictures().images, pictures().labels, strict=True)):
        (tmp_path / "real" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / str(label) / f"{index}.png")
    base = ["--bundle", str(bundle.folder), "--device", "cpu"]
    draw = [*base, "--seeds", "0-11", "--steps", "2", "--dg-weight", "0"]
    for form, name in (("latents", "fakes"), ("png", "decoded")):
        result = CliRunner().invoke(sample, [*draw, "--format", form, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    net = '{"model_channels": 8, "channel_mult": [1, 2], "num_head_channels": 8, "attention_resolutions": []}'
    options = ["--trunk", "own", "--net", net, "--images", "16", "--batch", "8", "--holdout", "6"]
    learn = ["discriminator", *base, *options, "--data", str(tmp_path / "real")]
    result = CliRunner().invoke(train, [*learn, "--generated", str(tmp_path / "decoded")])
    assert result.exit_code == 2 and "draw them with --format latents" in result.output.splitlines()[-1]
    result = CliRunner().invoke(train, [*learn, "--generated", str(tmp_path / "fakes")])
    assert result.exit_code == 0, result.output
    assert bundles.read(bundle.folder).spec("discriminator").keywords["in_channels"] == 4
    draw[-1] = "1"
    result = CliRunner().invoke(sample, [*draw, "--out", str(tmp_path / "guided")])
    assert result.exit_code == 0, result.output
