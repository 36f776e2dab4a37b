"""DiT: published sizes, its laws, and the guidance that DiT-G++ adds to it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from dgfast import bundle as bundles
from dgfast import convert, nets
from dgfast.bundle import VaeSpec
from dgfast.checkpoints import openai_pt
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import DDPMPrecond
from dgfast.errors import UserError
from dgfast.guidance import ClassifierFreeGuidance, DiscriminatorGuidance, guided_denoiser, guided_posterior
from dgfast.nets.discriminator import Discriminator
from dgfast.nets.dit import PRESETS
from dgfast.networks import Networks, load
from dgfast.noise_levels import vp_alpha, vp_time
from dgfast.runtimes.cpu import build as cpu
from dgfast.sampler import Sampler

FilledNet = Callable[..., Any]
SMALL = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


# The network ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "millions"),  # arXiv 2212.09748, table 1 and figure 2: 33, 130, 458, 675
    [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/8", 459), ("DiT-XL/2", 675)],
)
def test_dit_presets_have_the_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        net = nets.build("DiT", **PRESETS[name])
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6) == millions
    assert not net.get_parameter("pos_embed").requires_grad


def test_dit_presets_are_all_there() -> None:
    assert set(PRESETS) == {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}


def test_dit_starts_as_zero(filled_net: FilledNet) -> None:
    """adaLN-Zero: every block starts as the identity, and the last layer at zero."""
    torch.manual_seed(0)
    net = nets.build("DiT", **SMALL)
    x = torch.randn(2, 4, 8, 8)
    assert not net(x, torch.tensor([3, 700]), torch.tensor([0, 4])).any()
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(net.get_submodule("blocks.0")(tokens, condition), tokens)


def test_dit_patches_come_back_where_they_were(filled_net: FilledNet) -> None:
    """With the last layer alone alive, a token's output appears in its own patch and nowhere else."""
    net = filled_net("DiT", SMALL | {"patch_size": 4, "learn_sigma": False}, "places/")
    tokens = torch.zeros(1, 4, 4 * 4 * 4)
    tokens[0, 1] = torch.arange(64.0) + 1  # the patch of row 0, column 1: 4 x 4 pixels of 4 channels, channels last
    image = net._image(tokens)
    assert torch.equal(image[0, :, :4, 4:], (torch.arange(64.0) + 1).view(4, 4, 4).permute(2, 0, 1))
    assert int((image != 0).sum()) == 64


def test_dit_labels_and_time_matter_and_samples_do_not_mix(filled_net: FilledNet) -> None:
    net = filled_net("DiT", SMALL, "alone/")
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 999]), torch.tensor([0, 3, net.null_class])
    both = net(x, t, y)
    assert both.shape == (3, 8, 8, 8)
    for b in range(3):
        alone = net(x[b : b + 1], t[b : b + 1], y[b : b + 1])
        torch.testing.assert_close(both[b : b + 1], alone, atol=1e-5, rtol=0)
    assert (net(x, t, y.flip(0)) - both).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-2
    assert (net(x, t.flip(0), y) - both).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-2


def test_dit_attention_is_softmax_of_its_scaled_products(filled_net: FilledNet) -> None:
    """The definition (arXiv 1706.03762, equation 1), head by head in float64."""
    attention = filled_net("DiT", SMALL, "attention/").double().get_submodule("blocks.0.attn")
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.get_submodule("qkv")(x).split(32, dim=-1)
    heads = []
    for h in range(2):
        part = slice(16 * h, 16 * h + 16)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    expected = attention.get_submodule("proj")(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), expected, atol=1e-10, rtol=0)
    attention.float()


@pytest.mark.parametrize(
    "wrong", [{"input_size": 9}, {"num_heads": 5}, {"hidden_size": 30, "num_heads": 3}, {"width": 3}]
)
def test_dit_sizes_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"multiple|width"):
        nets.build("DiT", **SMALL | wrong)


def test_dit_without_dropped_classes_has_no_null_class() -> None:
    net: nn.Module = nets.build("DiT", **SMALL, class_dropout_prob=0.0)
    assert net.null_class is None and net.get_parameter("y_embedder.embedding_table.weight").shape == (5, 32)


# Two scales and a branch ----------------------------------------------------------------------------------------------
def stand_in(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
    """Conditional images are 1, unconditional ones 0: what comes out is the scale."""
    return torch.full_like(x, 0.0 if class_labels is None else 1.0)


def scales(guidance: ClassifierFreeGuidance, *sigmas: float) -> Tensor:
    """The guided image of `stand_in` at each noise level: [levels, channels]."""
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    x = torch.zeros(len(sigma), 4, 2, 2, dtype=torch.float64)
    denoised, _ = guided_denoiser(stand_in, [guidance])(x, sigma, torch.ones(len(sigma), 1))
    assert (denoised == denoised[:, :, :1, :1]).all()
    return denoised[:, :, 0, 0]


def test_classifier_free_scale_changes_at_the_branch() -> None:
    guidance = ClassifierFreeGuidance(stand_in, 1.25, scale_low=3.0, branch=0.5)
    got = scales(guidance, 0.1, 0.5, 0.5000001, 80.0)[:, 0]
    assert got.tolist() == [3.0, 3.0, 1.25, 1.25]


def test_classifier_free_guides_the_first_channels_alone() -> None:
    assert scales(ClassifierFreeGuidance(stand_in, 4.0, channels=3), 1.0).tolist() == [[4.0, 4.0, 4.0, 1.0]]
    assert scales(ClassifierFreeGuidance(stand_in, 4.0), 1.0).tolist() == [[4.0] * 4]


@pytest.mark.parametrize(
    ("scale", "low", "between", "active"),
    [
        (1.0, 3.0, (0.6, 80.0), False),
        (1.0, 3.0, (0.4, 0.6), True),
        (1.0, 3.0, (0.5, 0.5), True),
        (2.0, 1.0, (0.1, 0.5), False),
        (2.0, 1.0, (0.1, 0.51), True),
        (1.0, 1.0, (0.1, 80.0), False),
        (2.0, None, (0.1, 0.2), True),
        (1.0, None, (0.1, 80.0), False),
    ],
)
def test_classifier_free_is_active_where_it_guides(
    scale: float, low: float | None, between: tuple[float, float], active: bool
) -> None:
    guidance = ClassifierFreeGuidance(stand_in, scale, scale_low=low, branch=0.5)
    assert guidance.active(*between) is active
    if not active:
        assert (scales(guidance, *between) == 1).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cfg_scale_low": 3.0}, "belong together"),
        ({"cfg_scale": 2.0, "cfg_branch": 0.5}, "belong together"),
        ({"cfg_scale_low": math.nan, "cfg_branch": 0.5}, "finite"),
        ({"cfg_scale_low": 3.0, "cfg_branch": -1.0}, "at least 0"),
        ({"cfg_scale_low": 3.0, "cfg_branch": math.inf}, "finite"),
        ({"cfg_channels": 0}, "cfg_channels 0"),
        ({"cfg_channels": 1.5}, "cfg_channels 1.5"),
    ],
)
def test_guidance_config_refuses_what_makes_no_schedule(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GuidanceConfig(**wrong)


def test_classifier_free_guidance_is_on_at_either_scale() -> None:
    assert ClassifierFreeGuidance.on(GuidanceConfig(cfg_scale_low=3.0, cfg_branch=0.5))
    assert ClassifierFreeGuidance.on(GuidanceConfig(cfg_scale=2.0))
    assert not ClassifierFreeGuidance.on(GuidanceConfig(cfg_channels=3))


# Guided sampling ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def denoiser(filled_net: FilledNet) -> DDPMPrecond:
    return DDPMPrecond(filled_net("DiT", SMALL, "denoiser/"), 8, 4, 5).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def discriminator(filled_net: FilledNet) -> Discriminator:
    """A conditional one of latents, both parts as small as they can be."""
    common = {"model_channels": 16, "num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16}
    trunk = {"image_size": 8, "in_channels": 4, "out_channels": 5, "channel_mult": [1, 1], "resblock_updown": True}
    head = {"image_size": 4, "in_channels": 16, "out_channels": 1, "channel_mult": [1], "pool": "attention"}
    return Discriminator(
        filled_net("EncoderUNetModel", common | trunk, "latent/trunk/"),
        filled_net("EncoderUNetModel", common | head | {"num_classes": 5}, "latent/head/"),
    ).eval()


DIT_G = GuidanceConfig(
    dg_weight=1.0, dg_window=(0.1011, 2.0), cfg_scale=1.25, cfg_scale_low=3.0, cfg_branch=0.7257, cfg_channels=3
)


def test_dit_discriminator_reads_the_conditional_half_alone(
    denoiser: DDPMPrecond, discriminator: Discriminator
) -> None:
    """Classifier-free guidance doubles the score evaluations; the discriminator still sees each latent once."""
    read: list[tuple[int, int]] = []

    def reading(u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None and bool(class_labels.any(dim=1).all())
        read.append((len(u), round(999 * float(t[0]))))
        return discriminator(u, t, class_labels)

    sampling = SamplingConfig(solver="ddpm", respacing="8", clip_denoised=True)
    sampler = Sampler(Networks(denoiser, reading, time=denoiser.time), sampling, DIT_G)
    images = sampler(range(3), [0, 4, 2])
    assert images.shape == (3, 4, 8, 8) and bool(images.isfinite().all())
    assert read == [(3, t) for t in (999, 856, 714, 571, 428, 285, 143)]  # 0 lies below the window
    assert sampler.score_evaluations == 16 and sampler.guidance_gradients == 7


def test_dit_window_and_branch_stand_between_the_published_timesteps(denoiser: DDPMPrecond) -> None:
    """DiT-G++ guides at t > 100 and takes its larger scale up to t = 200, branch included."""
    tau = vp_time(denoiser.levels)
    assert tau[100] < DIT_G.dg_window[0] < tau[101] and tau[999] < DIT_G.dg_window[1]
    assert denoiser.levels[200] < DIT_G.cfg_branch < denoiser.levels[201]


@pytest.mark.parametrize(
    ("guidance", "said"),
    [(GuidanceConfig(cfg_scale=2.0, cfg_channels=5), "--cfg-channels 5"), (GuidanceConfig(cfg_scale=2.0), None)],
)
def test_dit_guidance_that_this_network_cannot_have_is_refused(
    denoiser: DDPMPrecond, filled_net: FilledNet, guidance: GuidanceConfig, said: str | None
) -> None:
    if said is None:  # nor can one that was never trained without labels
        raw = filled_net("DiT", SMALL | {"class_dropout_prob": 0.0}, "labels/")
        denoiser, said = DDPMPrecond(raw, 8, 4, 5), "trained without labels"
    with pytest.raises(UserError, match=said):
        Sampler(Networks(denoiser), SamplingConfig(solver="ddpm", respacing="4"), guidance)


@torch.no_grad()
def test_dit_compiled_equals_eager(
    denoiser: DDPMPrecond, discriminator: Discriminator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --compile runs: DiT twice, the discriminator's gradient, both scales, inside and outside of the window."""
    guidances = [
        ClassifierFreeGuidance(denoiser, 1.25, scale_low=3.0, branch=0.7257, channels=3),
        DiscriminatorGuidance(discriminator, 100.0, DIT_G.dg_window, denoiser.time),
    ]
    function = guided_posterior(denoiser, guidances)

    def inputs(seed: int, *timesteps: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        sigma = denoiser.levels[list(timesteps)]
        x = torch.randn(len(sigma), 4, 8, 8, dtype=torch.float64, generator=generator)
        x = x / vp_alpha(sigma)[:, None, None, None]
        bounds = torch.full_like(sigma, -4.0), torch.full_like(sigma, -2.0)
        return x, sigma, torch.eye(5)[[t % 5 for t in timesteps]], *bounds

    built = cpu.build(function, inputs(0, 500, 500, 500))
    for seed, timesteps in enumerate([(999, 640, 201), (200, 101, 100), (3, 0, 700)]):
        arguments = inputs(seed, *timesteps)
        for mine, reference in zip(built(*arguments), function(*arguments), strict=True):
            error, size = (values.abs().view(3, -1).amax(1) for values in (mine - reference, reference))
            assert (error <= 2e-5 * size).all(), (timesteps, error, size)


# Official checkpoints -------------------------------------------------------------------------------------------------
def converted(*arguments: object) -> str:
    result = CliRunner().invoke(convert.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def checkpoint(tmp_path: Path, filled_net: FilledNet) -> tuple[Path, nn.Module]:
    net = filled_net("DiT", SMALL, "checkpoint/")
    torch.save(net.state_dict(), tmp_path / "dit.pt")
    return tmp_path / "dit.pt", net


def test_dit_checkpoint_becomes_a_bundle(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, net = checkpoint
    output = converted(path, "--out", tmp_path / "b", "--role", "score", "--set", "num_heads=2", "--vae", "some/vae")
    assert "DDPMPrecond" in output
    bundle = bundles.read(tmp_path / "b")
    assert bundle.vae == VaeSpec("some/vae", 0.18215)
    assert (bundle.sampling.solver, bundle.sampling.respacing, bundle.sampling.clip_denoised) == ("ddpm", "250", False)
    assert bundle.guidance == GuidanceConfig(dg_window=DIT_G.dg_window)
    score: Any = load(bundle).denoiser
    assert (score.img_channels, score.img_resolution, score.label_dim, score.null_class) == (4, 8, 5, 5)
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([999, 20]), torch.tensor([5, 1])
    torch.testing.assert_close(score.model(x, t, y), net(x, t, y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_dit_published_checkpoint_says_itself_what_it_is(name: str) -> None:
    from dgfast.checkpoints import dit

    with torch.device("meta"):
        tensors = nets.build("DiT", **PRESETS[name]).state_dict()
    keywords, assumed = dit.score_keywords(tensors, {}, name)
    with torch.device("meta"):
        made: Any = nets.build("DDPMPrecond", **keywords).get_submodule("model")
    assert {key: value.shape for key, value in made.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    assert [block.attn.num_heads for block in made.blocks] == [PRESETS[name]["num_heads"]] * PRESETS[name]["depth"]
    assert made.out_channels == 8 and made.null_class == 1000
    assert {entry.name: entry.value for entry in assumed} == {
        "num_heads": PRESETS[name]["num_heads"], "class_dropout_prob": "above 0",
    }  # fmt: skip


def test_dit_of_no_published_size_needs_its_heads(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    arguments = [str(checkpoint[0]), "--out", str(tmp_path / "b"), "--role", "score"]
    result = CliRunner().invoke(convert.main, arguments)
    assert result.exit_code == 2 and "--set num_heads=" in result.output and not (tmp_path / "b").exists()


def test_dit_with_a_tensor_missing_is_refused(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, net = checkpoint
    for name in ("pos_embed", "blocks.1.attn.qkv.bias"):
        torch.save({key: value for key, value in net.state_dict().items() if key != name}, path)
        arguments = [str(path), "--out", str(tmp_path / "b"), "--role", "score", "--set", "num_heads=2"]
        result = CliRunner().invoke(convert.main, arguments)
        assert result.exit_code == 2 and name in result.output and not (tmp_path / "b").exists()


def test_dit_vae_belongs_to_a_score_network(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    arguments = [str(checkpoint[0]), "--out", str(tmp_path / "b"), "--role", "classifier", "--vae", "some/vae"]
    result = CliRunner().invoke(convert.main, arguments)
    assert result.exit_code == 2 and "--vae is for a score network" in result.output


@pytest.mark.parametrize(
    "shape",
    [
        {"image_size": 32, "in_channels": 4, "out_channels": 1000, "condition": False},
        {"image_size": 8, "in_channels": 384, "out_channels": 1, "condition": True},
    ],
)
def test_dit_discriminator_checkpoints_say_themselves_what_they_are(shape: dict[str, Any]) -> None:
    """DG's encoder of latents and the conditional head on its 384 x 8 x 8 features."""
    keywords = {
        "classifier_use_fp16": False, "classifier_width": 128, "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True, "classifier_pool": "attention", **shape,
    }  # fmt: skip
    with torch.device("meta"):
        net: Any = nets.build("create_classifier", **keywords)
    assert openai_pt.classifier_keywords(net.state_dict(), {}, "file") == keywords
    if shape["image_size"] == 32:
        assert (net.feature_channels, net.feature_size) == (384, 8)
