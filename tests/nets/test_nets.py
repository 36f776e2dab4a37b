"""What the goldens cannot show of the networks: the errors of `build`, other precisions, and the filters' fast path."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import nets
from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.blocks import Conv2d
from dgfast.nets.discriminator import Discriminator
from dgfast.nets.text_options import numbers

NetFactory = Callable[..., Any]
EDM = {
    "img_resolution": 8,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
}
ENCODER: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}
CLASSIFIER = {
    "image_size": 8,
    "classifier_use_fp16": False,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
RECIPES = [("EDMPrecond", EDM), ("EncoderUNetModel", ENCODER), ("create_classifier", CLASSIFIER)]

SHAPES = [(2, 3, 8, 8), (2, 5), (2, 1000)]


def without(keywords: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if key != name}


# Building -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "keywords", "shape"), [(*r, s) for r, s in zip(RECIPES, SHAPES, strict=True)])
def test_nets_build_gives_what_it_is_asked_for(kind: str, keywords: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = nets.build(kind, **keywords)
    out = net(torch.zeros(2, 3, 8, 8), torch.ones(2))
    assert out.shape == shape and out.dtype == torch.float32


@pytest.mark.parametrize(
    ("keywords", "layer", "shape"),
    [
        ({"model_channels": 24}, "enc.8x8_conv.weight", (24, 3, 3, 3)),
        ({"channel_mult": [1, 3]}, "enc.4x4_block0.conv0.weight", (48, 16, 3, 3)),
        ({"num_blocks": 2}, "enc.8x8_block1.conv0.weight", (16, 16, 3, 3)),
        ({"attn_resolutions": [8]}, "enc.8x8_block0.qkv.weight", (48, 16, 1, 1)),
        ({"label_dim": 5}, "map_label.weight", (16, 5)),
        ({"augment_dim": 9}, "map_augment.weight", (16, 9)),
        ({"channel_mult_emb": 2}, "map_layer1.weight", (32, 32)),
        ({"channel_mult_noise": 2}, "map_layer0.weight", (64, 32)),
        ({"img_channels": 4}, "dec.8x8_aux_conv.weight", (4, 16, 3, 3)),
        ({"img_resolution": 32}, "enc.16x16_down.conv0.weight", (16, 16, 3, 3)),
    ],
)
def test_nets_build_hears_every_keyword(keywords: dict[str, Any], layer: str, shape: tuple[int, ...]) -> None:
    """Each layer of a size that the default has not."""
    sizes = [
        dict(nets.build("EDMPrecond", **EDM | own).get_submodule("model").named_parameters()) for own in ({}, keywords)
    ]
    assert layer not in sizes[0] or sizes[0][layer].shape != shape
    assert tuple(sizes[1][layer].shape) == shape


@pytest.mark.parametrize(
    ("kind", "keywords", "named"),
    [
        ("DDPMPrecond", EDM, "DDPMPrecond"),
        ("EDMPrecond", EDM | {"model_type": "DiT"}, "DiT"),
        ("EDMPrecond", EDM | {"sigma_mean": 0.5}, "sigma_mean"),
        ("VPPrecond", EDM | {"sigma_data": 0.5}, "sigma_data"),
        ("EDMPrecond", without(EDM, "img_resolution"), "img_resolution"),
        ("EDMPrecond", without(EDM, "model_type"), "model_type"),
        ("EDMPrecond", EDM | {"embedding_type": "learned"}, "embedding_type .*learned"),
        ("EDMPrecond", EDM | {"encoder_type": "deep"}, "encoder_type .*deep"),
        ("EDMPrecond", EDM | {"decoder_type": "residual"}, "decoder_type .*residual"),
        ("EncoderUNetModel", ENCODER | {"dims": 2}, "dims"),
        ("EncoderUNetModel", without(ENCODER, "out_channels"), "out_channels"),
        ("EncoderUNetModel", ENCODER | {"pool": "global"}, "pool .*global"),
        ("EncoderUNetModel", ENCODER | {"num_head_channels": 48}, "64 channels .*heads of 48"),
        ("create_classifier", without(CLASSIFIER, "classifier_width"), "classifier_width"),
        ("create_classifier", CLASSIFIER | {"width": 64}, "width"),
        ("create_classifier", CLASSIFIER | {"image_size": 48}, "48.*32"),
    ],
)
def test_nets_build_names_what_it_cannot_build(kind: str, keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        nets.build(kind, **keywords)


@pytest.mark.parametrize(
    ("kind", "keywords", "option"), [(*RECIPES[0], "use_fp16"), (*RECIPES[2], "classifier_use_fp16")]
)
def test_nets_build_ignores_how_the_official_code_would_run_it(
    kind: str, keywords: dict[str, Any], option: str
) -> None:
    single, half = (nets.build(kind, **keywords | {option: value}) for value in (False, True))
    half.load_state_dict(single.state_dict())
    x, sigma = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert torch.equal(single.eval()(x, sigma), half.eval()(x, sigma))


def test_nets_iddpm_predicts_twice_the_channels_and_uses_half() -> None:
    net = nets.build("iDDPMPrecond", **EDM)
    raw = [p for name, p in net.get_submodule("model").named_parameters() if name.endswith("conv.weight")][-1]
    assert raw.shape[0] == 6
    assert net(torch.zeros(1, 3, 8, 8), torch.ones(1)).shape == (1, 3, 8, 8)


def test_nets_discriminator_refuses_a_head_that_does_not_fit_its_trunk() -> None:
    trunk = EncoderUNetModel(**ENCODER)
    fitting = EncoderUNetModel(**ENCODER | {"image_size": 4, "in_channels": 64, "channel_mult": [1]})
    Discriminator(trunk, fitting)
    for wrong in ({"image_size": 8, "in_channels": 64}, {"image_size": 4, "in_channels": 32}):
        with pytest.raises(ValueError, match="64 x 4 x 4"):
            Discriminator(trunk, EncoderUNetModel(**ENCODER | wrong))


# Precision ------------------------------------------------------------------------------------------------------------
def in_bfloat16(net: nn.Module) -> nn.Module:
    """As a bundle loads it: weights in bfloat16, buffers as they are."""
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.bfloat16()
    return net


@pytest.mark.parametrize("kind", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"model_type": "DhariwalUNet", "model_channels": 32},
        {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "resample_filter": [1, 3, 3, 1],
            "channel_mult_noise": 2,
        },
    ],
    ids=["ddpmpp", "adm", "ncsnpp"],
)
def test_nets_denoisers_with_bfloat16_weights_return_nearly_the_same_float32(
    tiny_net: NetFactory, kind: str, layout: dict[str, Any]
) -> None:
    net = tiny_net(label_dim=3, kind=kind, **layout)
    sigma = torch.tensor([0.05, 0.5, 3.0, 40.0], dtype=torch.float64)
    x = (
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        * (0.25 + sigma**2).sqrt()[:, None, None, None]
    )
    labels = torch.eye(3)[[0, 1, 2, 0]]
    with torch.no_grad():
        exact, low = net(x, sigma, labels), in_bfloat16(net)(x, sigma, labels)
    assert exact.dtype == low.dtype == torch.float32
    for image, rounded, level in zip(exact, low, sigma, strict=True):
        # c_out scales the network's output and so its rounding: sigma_data at most for EDM, sigma for the others.
        assert (image - rounded).abs().max() < 0.06 * max(image.std(), 0.5 if kind == "EDMPrecond" else float(level))
    assert (exact - low).abs().max() > 0


def test_nets_discriminator_with_bfloat16_weights_judges_nearly_the_same(tiny_discriminator: NetFactory) -> None:
    discriminator = tiny_discriminator(num_classes=4)
    u = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64), torch.eye(4)
    exact, low = discriminator(u, t, labels), in_bfloat16(discriminator)(u, t, labels)
    assert exact.shape == low.shape == (4,) and low.dtype == torch.bfloat16
    assert 0 < (exact - low.float()).abs().max() < 0.1 * exact.abs().max()
    assert not torch.equal(exact, discriminator(u, t, labels.flip(0)))  # the class is read


# Filters --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_nets_box_filter_takes_the_fast_path_to_the_same_result(direction: str, kernel: int) -> None:
    """Mean pooling and repetition against the general convolution with the 2 x 2 box, forward and gradient."""
    generator = torch.Generator().manual_seed(3)
    fast = Conv2d(5, 5, kernel, resample_filter=(1, 1), up=direction == "up", down=direction == "down")
    general = copy.deepcopy(fast)
    assert fast.is_box
    general.is_box = False
    images = torch.randn(2, 12, 6, 5, generator=generator).permute(0, 3, 1, 2)  # channels last, height not width
    results: list[tuple[Tensor, Tensor]] = []
    for layer in (fast, general):
        x = images.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(x)
        pull = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append((out, torch.autograd.grad((out * pull).sum(), x)[0]))
    assert results[0][0].shape[-2:] == ((24, 12) if direction == "up" else (6, 3))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_nets_low_pass_filters_keep_a_constant_image() -> None:
    """Away from the border, every filter's taps sum to one."""
    for taps in ((1, 1), (1, 3, 3, 1)):
        for up in (True, False):
            out = Conv2d(1, 1, 0, resample_filter=taps, up=up, down=not up)(torch.full((1, 1, 16, 16), 2.0))
            torch.testing.assert_close(out[..., 3:-3, 3:-3], torch.full_like(out[..., 3:-3, 3:-3], 2.0))


# Lists of numbers as people and JSON write them ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        pytest.param("16,8", [16, 8], id="text"),
        pytest.param("0.5,1, 2", [0.5, 1, 2], id="fractions"),
        pytest.param(16, [16], id="number"),
        pytest.param([1, 2.0, "4"], [1, 2, 4], id="list"),
        pytest.param("", [], id="empty"),
        pytest.param([], [], id="empty_list"),
    ],
)
def test_numbers_are_read_from_text_number_or_list(option: object, expected: list[float]) -> None:
    assert numbers(option, "attention_resolutions") == expected
    assert [type(number) for number in numbers(option, "")] == [type(number) for number in expected]


@pytest.mark.parametrize("option", [True, None, "16,x", {"a": 1}, [[16]], "inf", float("nan"), "9" * 400])
def test_other_things_are_no_numbers(option: object) -> None:
    with pytest.raises(ValueError, match=r"attention_resolutions .* must be numbers, such as 16,8"):
        numbers(option, "attention_resolutions")


@pytest.mark.parametrize(
    ("kind", "keywords", "name", "alike"),
    [
        pytest.param(
            "create_model", {"image_size": 64, "num_channels": 32, "num_res_blocks": 1}, "attention_resolutions",
            ("16", 16, [16]), id="adm_attention",
        ),
        pytest.param(
            "create_model", {"image_size": 8, "num_channels": 32, "num_res_blocks": 1}, "channel_mult",
            ("2", 2, [2]), id="adm_channels",
        ),
        pytest.param(
            "create_classifier",
            {
                "image_size": 16, "classifier_use_fp16": False, "classifier_width": 64, "classifier_depth": 1,
                "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True,
                "classifier_pool": "attention",
            },
            "classifier_attention_resolutions", ("8", 8, [8]), id="classifier_attention",
        ),
        pytest.param(
            "EDMPrecond",
            {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "num_blocks": 1},
            "channel_mult", ("1,2", [1, 2], (1, 2)), id="edm_channels",
        ),
    ],
)  # fmt: skip
def test_one_option_in_all_its_spellings_builds_one_network(
    kind: str, keywords: dict[str, Any], name: str, alike: tuple[object, ...]
) -> None:
    with torch.device("meta" if kind.startswith("create") else "cpu"):
        built = [nets.build(kind, **keywords, **{name: option}).state_dict() for option in alike]
    shapes = [{name: value.shape for name, value in state.items()} for state in built]
    assert shapes[0] == shapes[1] == shapes[2]
