"""ADM's networks beyond their recorded numbers: published sizes, options, and the way from a checkpoint to images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import convert, nets, sample
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.nets.adm_unet import PUBLISHED
from dgfast.networks import load
from tests.support.adm import TINY, NetFactory, images


# Networks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "millions"),
    [("adm-64", 296), ("adm-128", 422), ("adm-256", 554), ("adm-256-uncond", 553), ("adm-512", 559)],
)
def test_adm_published_networks_have_the_published_sizes(name: str, millions: int) -> None:
    """arXiv 2105.05233, tables of hyperparameters."""
    with torch.device("meta"):
        net = nets.build("create_model", **PUBLISHED[name])
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6) == millions


def test_adm_attention_orders_are_one_map_with_its_rows_in_another_order(filled_net: NetFactory) -> None:
    old, new = (
        filled_net("create_model", TINY | {"use_new_attention_order": order}, "order/") for order in (False, True)
    )
    x, t, labels = images(2, 3, 8, 8).float(), torch.tensor([3.0, 700.0]), torch.tensor([1, 5])
    turned = nets.build("create_model", **TINY).eval()
    state = {
        name: value.unflatten(0, (-1, 3, 32)).transpose(0, 1).flatten(0, 2) if ".qkv." in name else value
        for name, value in old.state_dict().items()
    }
    turned.load_state_dict(state)
    assert (old(x, t, labels) - new(x, t, labels)).abs().max() > 1e-3  # two heads where attention stands
    torch.testing.assert_close(turned(x, t, labels), old(x, t, labels), rtol=1e-4, atol=1e-5)


def test_adm_heads_may_be_others_on_the_way_up() -> None:
    net = nets.build("create_model", **TINY | {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4})
    heads = [(name.split(".")[0], m.num_heads) for name, m in net.named_modules() if hasattr(m, "num_heads")]
    assert set(heads) == {("input_blocks", 2), ("middle_block", 2), ("output_blocks", 4)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"num_head_channels": 48}, "do not split"), ({"channel_mult": ""}, "no published channel_mult for image_size 8")],
)
def test_adm_refuses_shapes_that_do_not_exist(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nets.build("create_model", **TINY | wrong)


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_adm_spatial_pools_read_the_means_of_every_block(filled_net: NetFactory, pool: str) -> None:
    shape = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1}
    net = filled_net(
        "EncoderUNetModel", shape | {"attention_resolutions": [], "channel_mult": [1, 2], "pool": pool}, "p/"
    )
    blocks: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *a: blocks.append(a[2])) for m in (*net.input_blocks, net.middle_block)]
    logits = net(images(2, 3, 8, 8).float(), torch.tensor([3.0, 700.0]))
    for hook in hooks:
        hook.remove()
    means = torch.cat([block.mean(dim=(2, 3)) for block in blocks], dim=1)
    assert means.shape == (2, 32 + 32 + 32 + 64 + 64) and logits.shape == (2, 5)
    hidden = torch.nn.functional.linear(means, net.out[0].weight, net.out[0].bias)
    if pool == "spatial_v2":
        hidden = torch.nn.functional.group_norm(hidden, 32, net.out[1].weight, net.out[1].bias)
        hidden = torch.nn.functional.silu(hidden)
    wanted = torch.nn.functional.linear(
        hidden.relu() if pool == "spatial" else hidden, net.out[-1].weight, net.out[-1].bias
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


# Bundles --------------------------------------------------------------------------------------------------------------
def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_adm_checkpoint_becomes_a_bundle_and_images(
    filled_net: NetFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, "adm-8", TINY)  # OpenAI's smallest has 296 million weights
    raw = filled_net("create_model", TINY, "tiny/adm/")
    torch.save({name: value.half() for name, value in raw.state_dict().items()}, tmp_path / "8x8_diffusion.pt")
    output = run(convert.main, tmp_path / "8x8_diffusion.pt", "--role", "score", "--out", tmp_path / "b")
    assert "score DDPMPrecond" in output
    bundle = bundles.read(tmp_path / "b")
    assert bundle.sampling == SamplingConfig(solver="ddpm", respacing="250", clip_denoised=True)
    net: Any = load(bundle).denoiser
    assert (net.img_resolution, net.label_dim, net.learn_sigma, net.noise_schedule) == (8, 1000, True, "linear")
    x, t, y = images(2, 3, 8, 8).float(), torch.tensor([9.0, 600.0]), torch.tensor([1, 2])
    torch.testing.assert_close(net.model(x, t, y), raw(x, t, y), rtol=2e-2, atol=2e-2)  # half-precision weights

    def drawn(*options: str) -> tuple[np.ndarray, dict[str, Any]]:
        out = tmp_path / "-".join(options)
        run(sample.main, "--bundle", tmp_path / "b", "--seeds", "0-1", "--format", "npz", "--out", out, *options)
        (shard,) = out.glob("*.npz")
        return np.load(shard)["images"], json.loads((out / "manifest.json").read_text())["job"]["sampling"]

    ancestral, job = drawn("--respacing", "4")
    assert ancestral.shape == (2, 8, 8, 3) and (job["solver"], job["respacing"]) == ("ddpm", "4")
    as_steps, job = drawn("--steps", "4", "--clip-denoised")
    assert np.array_equal(as_steps, ancestral) and job["respacing"] == "4" and job["clip_denoised"] is True
    _, job = drawn("--solver", "heun", "--grid", "edm", "--steps", "4", "--clip-denoised=false")
    assert job["respacing"] is None and job["clip_denoised"] is False


def test_adm_schedules_of_weights_survive_the_bundle_file(tmp_path: Path) -> None:
    guidance = GuidanceConfig(
        dg_weight=1.0, dg_schedule=((0.1, 0.0), (0.5, 2.0)), cfg_scale=2.0, guidance_interval=(0.1, math.inf)
    )
    bundle = replace(bundles.read("mnist32"), folder=tmp_path, nets={}, guidance=guidance)
    bundles.write(bundle)
    assert bundles.read(tmp_path).guidance == guidance
