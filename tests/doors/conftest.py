"""What the door `python -m dgfast.sample` draws from in its tests, and draws there without guidance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.nets.adm import EncoderUNetModel
from dgfast.nets.discriminator import Discriminator
from tests.support.sample import draw, images_of

_SCORE = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_ENCODER = {"num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16, "model_channels": 16}
_TRUNK = {"image_size": 8, "in_channels": 1, "out_channels": 3, "channel_mult": [1, 2], "resblock_updown": True}
_HEAD = {"image_size": 4, "in_channels": 32, "out_channels": 1, "channel_mult": [1], "num_classes": 3}


def _randomise(net: torch.nn.Module) -> torch.nn.Module:
    """Networks are born with zeroed last layers, which would hide every guidance."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def _centre(trunk: EncoderUNetModel, head: EncoderUNetModel) -> None:
    """Shift a random head's logits to both sides of 0 around time 0.6, as boosting needs."""
    with torch.no_grad():
        rows = torch.eye(3)[torch.arange(60) % 3]
        logits = Discriminator(trunk, head)(torch.randn(60, 1, 8, 8), torch.full((60,), 0.6), rows)
        head.get_parameter("out.3.bias").sub_(logits.median())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every role, for 8 x 8 images of 3 classes."""
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "tiny", "tiny", {})
    made: dict[str, torch.nn.Module] = {}
    for role, kind, keywords in (
        ("score", "EDMPrecond", _SCORE),
        ("reference", "EDMPrecond", _SCORE | {"channel_mult": [2]}),
        ("classifier", "EncoderUNetModel", _ENCODER | _TRUNK),
        ("discriminator", "EncoderUNetModel", _ENCODER | _HEAD),
    ):
        net = made[role] = _randomise(nets.build(kind, **keywords))
        if role == "discriminator":
            trunk = made["classifier"]
            assert isinstance(trunk, EncoderUNetModel) and isinstance(net, EncoderUNetModel)
            _centre(trunk, net)
        bundle = bundles.with_net(bundle, role, net, kind, keywords)
    bundles.write(bundle)
    return bundle.folder


@pytest.fixture(scope="session")
def score_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same score network and nothing else."""
    net = nets.build("EDMPrecond", **_SCORE)
    folder = tmp_path_factory.mktemp("bundles") / "score-only"
    bundles.write(bundles.with_net(Bundle(folder, "score-only", {}), "score", net, "EDMPrecond", _SCORE))
    return folder


@pytest.fixture(scope="session")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Images of the tiny bundle without guidance."""
    out = tmp_path_factory.mktemp("plain") / "out"
    result = draw(tiny, out)
    assert result.exit_code == 0, result.output
    return images_of(out)
