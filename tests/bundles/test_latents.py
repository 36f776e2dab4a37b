"""Bundles of latents: what decodes them, and what is said where nothing can."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import dgfast
from dgfast import bundle as bundles
from dgfast import latents, nets
from dgfast.bundle import Bundle, VaeSpec
from dgfast.errors import UserError
from dgfast.image_folder import read_images
from dgfast.outputs import to_uint8
from dgfast.sample import main
from tests.support.tiny_vae import tiny_vae

_SCORE = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_SCALE = 0.5
_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae()


@pytest.fixture
def latent(tmp_path: Path, vae: Any) -> Bundle:
    """A bundle of latents 4 x 8 x 8 for images 3 x 16 x 16, its VAE in a folder beside the networks."""
    bundle = Bundle(tmp_path / "latent", "latent", {}, vae=VaeSpec("vae", _SCALE))
    torch.manual_seed(1)
    net = nets.build("EDMPrecond", **_SCORE)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    bundles.write(bundle := bundles.with_net(bundle, "score", net, "EDMPrecond", _SCORE))
    vae.save_pretrained(bundle.folder / "vae")
    return bundle


def _sample(bundle: Bundle, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle.folder), "--seeds", "0-8", "--steps", "2", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *options])


def _refused(bundle: Bundle, out: Path, *options: str) -> str:
    """The one line with which sampling ends before anything was made."""
    result = _sample(bundle, out, *options)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1, result
    assert not out.exists()
    return result.output


def _expected(bundle: Bundle, vae: Any, scale: float) -> np.ndarray:
    """The images of seeds 0 to 8, one decoded by itself."""
    drawn = dgfast.Sampler(dgfast.load(bundle), dgfast.SamplingConfig(num_steps=2))(range(9))
    with torch.no_grad():
        return to_uint8(torch.cat([vae.decode(z[None] / scale).sample for z in drawn]))


def test_latents_are_decoded_into_the_images_on_disk(latent: Bundle, vae: Any, tmp_path: Path) -> None:
    result = _sample(latent, tmp_path / "out")
    assert result.exit_code == 0, result.output
    images, _ = read_images(tmp_path / "out")
    expected = _expected(latent, vae, _SCALE)
    assert images.shape == (9, 16, 16, 3) and images.std() > 1
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["job"]["vae"] == {
        "source": "vae",
        "scale": _SCALE,
    }


def test_latents_take_the_vae_of_the_command_line(latent: Bundle, vae: Any, tmp_path: Path) -> None:
    bundles.write(bare := dataclasses.replace(latent, vae=None))
    result = _sample(bare, tmp_path / "out", "--vae", str(latent.folder / "vae"))
    assert result.exit_code == 0, result.output
    expected = _expected(bare, vae, latents.SCALE)
    assert np.abs(read_images(tmp_path / "out")[0].astype(int) - expected).max() <= 1


def test_latents_of_edm2_have_a_scale_and_bias_a_channel_and_pixels_from_0_to_1(latent: Bundle, vae: Any) -> None:
    spec = VaeSpec("vae", (0.5, 1.0, 2.0, 4.0), (0.1, 0.0, -0.3, 1.0), "unit")
    bundles.write(dataclasses.replace(latent, vae=spec))
    assert bundles.read(latent.folder).vae == spec
    decode = latents.decoder(bundles.read(latent.folder), 4, _CPU)
    z = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = torch.stack([(z[:, c] - spec.bias[c]) / spec.scale[c] for c in range(4)], 1)  # type: ignore[index]
    with torch.no_grad():
        wanted = (vae.decode(raw).sample.clamp(0, 1) * 255).floor()
    assert decode is not None and decode(z).dtype == torch.uint8 and 0 < wanted.mean() < 255
    assert (decode(z).float() - wanted).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scale": [0.5, 0.0]}, "a number above 0, or one a channel"),
        ({"bias": [0.0, float("inf")]}, "must be finite"),
        ({"pixels": "bytes"}, "signed or unit"),
    ],
)
def test_latents_of_no_possible_scale_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        VaeSpec("vae", **changes)


def test_latents_scale_of_other_channels_is_refused(latent: Bundle) -> None:
    bundle = dataclasses.replace(latent, vae=VaeSpec("vae", (0.5, 0.5)))
    with pytest.raises(UserError, match="scale has 2 numbers, latents have 4 channels"):
        latents.decoder(bundle, 4, _CPU)


def test_latents_bundle_says_what_decodes_them(latent: Bundle) -> None:
    assert bundles.read(latent.folder) == latent
    assert bundles.read("mnist32").vae is None and latents.decoder(bundles.read("mnist32"), 1, _CPU) is None


def test_latents_without_a_vae_are_refused(latent: Bundle, tmp_path: Path) -> None:
    bundles.write(dataclasses.replace(latent, vae=None))
    said = _refused(latent, tmp_path / "out")
    assert "latents of 4 channels" in said and "--vae" in said


def test_latents_of_other_channels_than_the_vae_are_refused(latent: Bundle) -> None:
    with pytest.raises(UserError, match=r"VAE vae decodes latents of 4 channels.* makes 3"):
        latents.decoder(latent, 3, _CPU)


def test_latents_vae_that_is_none_is_refused(latent: Bundle, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    said = _refused(latent, tmp_path / "out", "--vae", str(tmp_path / "nothing"))
    assert "no AutoencoderKL" in said and "nothing" in said


def test_latents_vae_in_a_format_that_can_run_code_is_refused(latent: Bundle, vae: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert "safetensors" in _refused(latent, tmp_path / "out", "--vae", str(tmp_path / "pickled"))


def test_latents_without_diffusers_name_the_extra(
    latent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'dgfast[latent]'" in _refused(latent, tmp_path / "out")


@pytest.mark.parametrize("entry", [{"source": ""}, {"source": 3}, {"source": "vae", "scale": 0}, {"scale": 1.0}, "vae"])
def test_latents_broken_vae_entry_is_refused(latent: Bundle, entry: Any) -> None:
    path = latent.folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": entry}))
    with pytest.raises(UserError, match=r"bundle\.json"):
        bundles.read(latent.folder)
