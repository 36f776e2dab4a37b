"""How networks start: the spread of freshly built weights (EDM, appendix F.3), and labels dropped in training alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import nets
from dgfast.nets.blocks import Conv2d, FourierEmbedding, Linear, UNetBlock, drop_labels

SHAPE: dict[str, Any] = {
    "img_resolution": 16, "img_channels": 3, "label_dim": 40, "augment_dim": 9, "model_channels": 64,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16],
}  # fmt: skip
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}


def xavier(gain: float) -> Callable[[int, int], float]:
    return lambda fan_in, fan_out: gain * math.sqrt(2 / (fan_in + fan_out))


def kaiming(gain: float) -> Callable[[int, int], float]:
    return lambda fan_in, fan_out: gain * math.sqrt(1 / fan_in)


def require_spread(layer: nn.Module, std: Callable[[int, int], float], name: str, uniform: bool = True) -> None:
    """The layer's weights have this standard deviation, to what so many draws allow, and its bias is zero."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    area = weight[0, 0].numel()
    deviation, values = std(weight.shape[1] * area, weight.shape[0] * area), weight.detach().double()
    tolerance = 6 / math.sqrt(weight.numel())
    assert float(values.square().mean().sqrt()) == pytest.approx(deviation, rel=tolerance, abs=0), name
    assert abs(float(values.mean())) <= tolerance * deviation, name
    if deviation and weight.numel() > 1000:  # a uniform one ends at sqrt(3) of its deviation, a normal one does not
        share = float(values.abs().max()) / deviation
        assert (1.6 < share <= math.sqrt(3) + 1e-3) if uniform else share > 2.5, name
    assert bias is None or not torch.any(bias), name


def layers(net: nn.Module) -> dict[str, nn.Module]:
    kinds = (Linear, Conv2d)
    return {name: m for name, m in net.named_modules() if isinstance(m, kinds) and m.weight is not None}


@pytest.mark.parametrize("own", [{}, NCSN], ids=["ddpmpp", "ncsnpp"])
def test_song_unet_starts_as_published(own: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = nets.build("EDMPrecond", model_type="SongUNet", **SHAPE, **own).get_submodule("model")
    seen = set()
    for name, layer in layers(net).items():
        last = name.endswith((".conv1", ".proj", "aux_conv"))  # these let a block start as nearly nothing
        gain = 1e-5 if last else math.sqrt(0.2) if name.endswith(".qkv") else 1.0
        require_spread(layer, xavier(gain), name)
        seen.add(gain)
    assert len(seen) == 3


def test_dhariwal_unet_starts_as_published() -> None:
    torch.manual_seed(1)
    net = nets.build("EDMPrecond", model_type="DhariwalUNet", **SHAPE).get_submodule("model")
    zero = 0
    for name, layer in layers(net).items():
        last = name.endswith((".conv1", ".proj", "out_conv", "map_augment"))
        label = name == "map_label"  # of unit deviation, whatever the number of classes
        std = kaiming(math.sqrt(SHAPE["label_dim"]) if label else 0.0 if last else math.sqrt(1 / 3))
        require_spread(layer, std, name, uniform=not label)
        zero += last
    assert zero > 3


def test_generator_and_fourier_features_start_with_unit_gain() -> None:
    torch.manual_seed(1)
    net = nets.build("Generator", img_resolution=16, img_channels=3, label_dim=30, channels=[64, 32])
    for name, layer in layers(net).items():
        conv = isinstance(layer, Conv2d)
        require_spread(layer, kaiming(1.0) if conv else xavier(1.0), name, uniform=not conv)
    assert float(FourierEmbedding(8192).freqs.std()) == pytest.approx(16.0, rel=0.06)


def test_unet_block_is_its_skip_at_the_start() -> None:
    torch.manual_seed(1)
    block = UNetBlock(16, 16, 8, attention=True, channels_per_head=16).eval()
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


# Labels dropped for classifier-free guidance --------------------------------------------------------------------------
def test_drop_labels_blanks_whole_rows_as_often_as_it_is_told() -> None:
    labels = torch.eye(10).repeat(2000, 1)
    torch.manual_seed(0)
    for probability in (0.1, 0.5):
        kept = drop_labels(labels, probability)
        blank = ~kept.any(dim=1)
        assert torch.equal(kept[~blank], labels[~blank])
        assert float(blank.float().mean()) == pytest.approx(probability, abs=0.015)
    assert not drop_labels(labels, 1.0).any()
    assert torch.equal(drop_labels(labels, 0.0), labels)


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_networks_drop_labels_in_training_alone(model_type: str, probability: float) -> None:
    keywords = SHAPE | {"img_resolution": 4, "model_channels": 32, "channel_mult": [1], "attn_resolutions": []}
    torch.manual_seed(0)
    net: Any = nets.build("EDMPrecond", model_type=model_type, label_dropout=probability, dropout=0.0, **keywords)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    count = 400
    x, sigma = torch.randn(1, 3, 4, 4).expand(count, -1, -1, -1), torch.ones(count)
    labels = torch.eye(40)[[3]].expand(count, -1)
    with torch.no_grad():
        none = net.eval()(x[:1], sigma[:1], None)
        evaluated = net(x, sigma, labels)
        trained = net.train()(x, sigma, labels)

    def unlabelled(images: Tensor) -> Tensor:
        return (images - none).abs().flatten(1).amax(1) < 1e-5

    assert not unlabelled(evaluated).any()
    share = float(unlabelled(trained).float().mean())
    assert share == pytest.approx(probability, abs=0.05)
