"""Guidance by the same network run differently in some layers: what changes, what is shared, in every runtime."""

import copy
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dgfast import GuidanceConfig, Sampler, SamplingConfig, UserError
from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.guidance import Autoguidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
from dgfast.guidance.perturbed_attention import values
from dgfast.guidance.smoothed_energy import blurred_attention, mean_attention
from dgfast.nets.adm_blocks import AttentionBlock
from dgfast.nets.dit import DiT
from dgfast.networks import Networks
from tests.support.adm import TINY, images
from tests.support.export import export
from tests.support.runtimes import largest_error

KINDS: dict[str, Any] = {
    "pag": PerturbedAttentionGuidance,
    "seg": SmoothedEnergyGuidance,
    "slg": SkipLayerGuidance,
}
SONG = {
    "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 16,
    "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip
DIT = {
    "model_type": "DiT", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "hidden_size": 32, "depth": 8,
    "num_heads": 2, "patch_size": 4,
}  # fmt: skip
EDM2 = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 16, "channel_mult": [1, 1],
    "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def song(filled_net: Callable[..., Any]) -> Any:
    return filled_net("EDMPrecond", SONG, "perturbed/song/")


@pytest.fixture(scope="module")
def perturbed_bundle(song: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("perturbed") / "song"
    bundle = Bundle(folder, "song", {}, SamplingConfig(num_steps=3))
    bundles.write(bundles.with_net(bundle, "score", song, "EDMPrecond", SONG))
    return bundles.read(folder)


def made(kind: str, net: Any, **options: Any) -> Any:
    networks: Any = SimpleNamespace(denoiser=net)  # raw networks too, and what is none
    return KINDS[kind].make(networks, GuidanceConfig(**{f"{kind}_scale": 2.0, **options}))


def changed(guidance: Any) -> list[str]:
    """Names of the layers that are no longer as they were."""
    names = []
    for name, module in guidance.reference.named_modules():
        attends = getattr(module, "attend", None)
        odd = attends is not None and getattr(attends, "__name__", "") != "dot_product"
        heads = getattr(module, "num_heads", 0) or getattr(module, "heads", 0)
        left_out = heads and hasattr(module, "attend") and attends is None
        names += [name.removeprefix("model.")] if odd or left_out or getattr(module, "skipped", False) else []
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_copy_shares_every_weight_and_leaves_the_network_as_it_was(kind: str, song: Any) -> None:
    x, sigma, labels = images(2, 1, 8, 8), torch.tensor([0.3, 2.0]), torch.eye(3)[:2]
    before = song(x, sigma, labels)
    guidance = made(kind, song)
    for mine, theirs in zip(
        chain(guidance.reference.parameters(), guidance.reference.buffers()),
        chain(song.parameters(), song.buffers()),
        strict=True,
    ):
        assert mine is theirs
    assert torch.equal(song(x, sigma, labels), before)
    direction, gate, log_ratio = guidance.correct(x, sigma.double(), labels, before)
    assert gate.tolist() == [2.0, 2.0] and log_ratio is None
    assert torch.equal(direction, before - guidance.reference(x, sigma, labels)) and direction.abs().max() > 1e-3
    # The same as autoguidance by that copy with a weight of 1 more.
    other, weight, _ = Autoguidance(guidance.reference, 3.0).correct(x, sigma.double(), labels, before)
    assert torch.equal(other, direction) and torch.equal(weight, gate)


def test_perturbed_layers_by_default_are_the_networks_middle(filled_net: Callable[..., Any], song: Any) -> None:
    assert changed(made("pag", song)) == changed(made("seg", song)) == changed(made("slg", song)) == ["dec.4x4_in0"]
    assert changed(made("pag", song, pag_layers="enc.8x8_block0,dec.8x8_block1")) == [
        "enc.8x8_block0",
        "dec.8x8_block1",
    ]
    adm = filled_net("create_model", TINY, "perturbed/adm/")
    assert changed(made("pag", adm)) == changed(made("slg", adm)) == ["middle_block.1"]
    dit = filled_net("DDPMPrecond", DIT, "perturbed/dit/")
    assert changed(made("slg", dit)) == ["blocks.2", "blocks.3", "blocks.4"]
    assert changed(made("pag", dit)) == [f"blocks.{i}.attn" for i in (2, 3, 4)]


def test_perturbed_edm2_attends_otherwise_in_its_middle_alone(filled_net: Callable[..., Any]) -> None:
    edm2 = filled_net("EDM2Precond", EDM2, "perturbed/edm2/")
    x, sigma, labels = images(2, 1, 8, 8), torch.tensor([0.3, 2.0]), torch.eye(3)[:2]
    plain, middle = edm2(x, sigma, labels), "unet.dec.4x4_in0"
    for kind in KINDS:
        guidance = made(kind, edm2)
        assert changed(guidance) == [middle]
        assert (guidance.reference(x, sigma, labels) - plain).abs().max() > 1e-4
    without = copy.deepcopy(edm2)
    torch.nn.init.zeros_(without.get_submodule(middle).attn_proj.weight)
    assert torch.equal(made("slg", edm2).reference(x, sigma, labels), without(x, sigma, labels))


def test_perturbed_attention_is_the_identity_for_a_matrix_of_attention() -> None:
    block = AttentionBlock(64, num_heads=2)
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)  # type: ignore[arg-type]
    x = images(2, 64, 4, 4).float()
    block.attend = values
    v = block.qkv(block.norm(x).flatten(2)).unflatten(1, (2, 3, 32))[:, :, 2].flatten(1, 2)
    torch.testing.assert_close(block(x), x + block.proj_out(v).view_as(x))
    block.attend = None
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("blur", "height", "width"), [(0.6, 8, 8), (1.0, 6, 4), (3.0, 5, 5)])
def test_smoothed_queries_are_blurred_by_the_published_kernel(blur: float, height: int, width: int) -> None:
    qkv = images(3, 2, 3, height * width, 4)
    q, k, v = qkv
    padded = q.unflatten(2, (height, width)).movedim(4, 2).flatten(0, 2)[:, None]
    for length, dim in ((height, 2), (width, 3)):
        size = math.ceil(6 * blur) | 1
        size = min(size, length - (length % 2 - 1))
        reach = torch.linspace(-(size - 1) / 2, (size - 1) / 2, size)
        kernel = torch.exp(-0.5 * (reach / blur) ** 2)
        kernel = (kernel / kernel.sum()).double().view([1, 1, size, 1] if dim == 2 else [1, 1, 1, size])
        pad = (0, 0, size // 2, size // 2) if dim == 2 else (size // 2, size // 2, 0, 0)
        padded = F.conv2d(F.pad(padded, pad, "reflect"), kernel)
    blurred = padded.view(2, 3, 4, height, width).movedim(2, 4).flatten(2, 3)
    expected = F.scaled_dot_product_attention(blurred, k, v)
    torch.testing.assert_close(blurred_attention(blur, height / width, qkv), expected, rtol=1e-6, atol=1e-6)


def test_an_infinite_blur_gives_every_token_the_mean_query() -> None:
    qkv = images(3, 2, 3, 16, 4)
    q, k, v = qkv
    everywhere = q.mean(dim=2, keepdim=True).expand_as(q)
    torch.testing.assert_close(mean_attention(qkv), F.scaled_dot_product_attention(everywhere, k, v))


def test_skipped_blocks_of_a_transformer_are_a_transformer_without_them(filled_net: Callable[..., Any]) -> None:
    full = filled_net("DDPMPrecond", DIT, "perturbed/dit/")
    guidance = made("slg", full, slg_layers="blocks.1,blocks.6")
    shorter = DiT(8, 4, 1, 32, 6, 2, num_classes=3)
    shorter.load_state_dict(full.model.state_dict(), strict=False)
    shorter.blocks = nn.ModuleList(block for i, block in enumerate(full.model.blocks) if i not in (1, 6))
    x, t, labels = images(2, 1, 8, 8).float(), torch.tensor([100.0, 900.0]), torch.tensor([0, 2])
    torch.testing.assert_close(guidance.reference.model(x, t, labels), shorter.eval()(x, t, labels), rtol=0, atol=0)


def test_perturbed_guidance_acts_in_its_interval_alone(song: Any) -> None:
    guidance = made("pag", song, pag_interval=(0.5, 5.0))
    sigma = torch.tensor([0.5, 0.6, 5.0, 5.1], dtype=torch.float64)
    assert guidance.correct(images(4, 1, 8, 8), sigma, None, images(4, 1, 8, 8))[1].tolist() == [0.0, 2.0, 2.0, 0.0]
    assert [guidance.active(s, s) for s in sigma.tolist()] == [False, True, True, False]
    sampling = SamplingConfig(num_steps=6, solver="euler")
    sampler = Sampler(Networks(denoiser=song), sampling, GuidanceConfig(pag_scale=2.0, pag_interval=(0.5, 5.0)))
    assert [bool(step.predictor) for step in sampler.steps] == [0.5 < step.sigma <= 5.0 for step in sampler.steps]
    plain, off = (Sampler(Networks(denoiser=song), sampling, GuidanceConfig(pag_scale=s)) for s in (0.0, 0.0))
    assert torch.equal(plain([0, 1], [0, 1]), off([0, 1], [0, 1])) and sampler.score_evaluations > 6


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
def test_perturbed_guidances_are_the_same_in_every_runtime(runtime: str, song: Any) -> None:
    networks, sampling = Networks(denoiser=song), SamplingConfig(num_steps=2, solver="euler")
    config = GuidanceConfig(pag_scale=0.5, seg_scale=0.7, seg_blur=0.8, slg_scale=0.4, slg_layers="enc.8x8_block0")
    latents, labels = images(2, 1, 8, 8).float(), torch.eye(3)[:2]
    eager = Sampler(networks, sampling, config).integrate(latents, labels)
    plain = Sampler(networks, sampling).integrate(latents, labels)
    assert (eager - plain).abs().max() > 1e-3
    mine = Sampler(networks, sampling, config, runtime=runtime).integrate(latents, labels)
    assert largest_error(mine, eager) < 1e-4


def test_an_exported_file_holds_the_shared_weights_once(perturbed_bundle: Bundle, tmp_path: Path) -> None:
    done = export("--bundle", str(perturbed_bundle.folder), "--out", str(tmp_path), "--pag-scale", "2")
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.onnx")
    weights = (perturbed_bundle.folder / "score.safetensors").stat().st_size
    assert weights < path.stat().st_size < 1.7 * weights  # both networks' operations, and one set of weights


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pag_layers": "dec.4x4_in1"}, "pag_layers dec.4x4_in1: such layers of this network are enc.8x8_block0, "),
        ({"pag_layers": "enc.8x8_block0,"}, "pag_layers : such layers of this network are"),
        ({"seg_scale": 1.0, "seg_blur": 0.0}, "seg_blur 0.0 must be above 0"),
        ({"seg_scale": 1.0, "seg_layers": "blocks.7"}, "seg_layers blocks.7: such layers of this network are"),
    ],
)
def test_layers_that_are_not_there_are_refused_with_those_that_are(
    options: dict[str, Any], line: str, song: Any
) -> None:
    with pytest.raises(UserError, match=line):
        Sampler(Networks(denoiser=song), guidance=GuidanceConfig(**{"pag_scale": 1.0, **options}))


def test_networks_without_such_layers_are_refused(filled_net: Callable[..., Any]) -> None:
    plain = filled_net("EDMPrecond", {**SONG, "channel_mult": [1], "attn_resolutions": []}, "perturbed/plain/")
    for module in plain.modules():
        if hasattr(module, "attend"):
            module.attend = None
    with pytest.raises(UserError, match="changes layers of a kind that this score network does not have"):
        made("pag", plain)
    function: Any = SimpleNamespace(**{name: getattr(plain, name) for name in ("label_dim", "img_resolution")})
    with pytest.raises(UserError, match="this score network, a SimpleNamespace, shows none"):
        made("slg", function)
