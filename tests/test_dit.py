"""DiT: published sizes, its laws, and the guidance that DiT-G++ adds to it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import nets
from dgfast.config import GuidanceConfig
from dgfast.errors import UserError
from dgfast.guidance import ClassifierFreeGuidance, guided_denoiser
from dgfast.nets.dit import PRESETS

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
        ({"cfg_branch": 0.5}, "belong together"),
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


def test_guidance_config_knows_whether_classifier_free_guidance_acts() -> None:
    assert GuidanceConfig(cfg_scale_low=3.0, cfg_branch=0.5).classifier_free
    assert GuidanceConfig(cfg_scale=2.0).classifier_free
    assert not GuidanceConfig(cfg_scale_low=1.0, cfg_branch=0.5).classifier_free
    assert not GuidanceConfig(cfg_channels=3).classifier_free
