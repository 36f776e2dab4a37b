"""The door `python -m dgfast.export.to_onnx`, called in this process, and a bundle for it."""

from pathlib import Path

import torch
from click.testing import CliRunner, Result

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.export import to_onnx

SCORE = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,  # the decoder has attention anyway
}  # fmt: skip
_ENCODER = {"num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16, "model_channels": 16}
_TRUNK = {"image_size": 8, "in_channels": 1, "out_channels": 10, "channel_mult": [1, 2], "resblock_updown": True}
_HEAD = {
    "image_size": 4, "in_channels": 32, "out_channels": 1, "channel_mult": [1], "num_classes": 10,
    "use_scale_shift_norm": True, "pool": "attention",
}  # fmt: skip
_ON_ITS_OWN = {"image_size": 8, "in_channels": 1}


def write_bundle(folder: Path, roles: tuple[str, ...]) -> Bundle:
    """A bundle whose networks have random weights everywhere: what is zero would hide the guidance.

    Without a classifier the discriminator reads the image itself.
    """
    head = _HEAD if "classifier" in roles else _HEAD | _ON_ITS_OWN
    bundle = Bundle(folder, folder.name, {}, SamplingConfig(num_steps=4), GuidanceConfig(dg_weight=2.0))
    described = {
        "score": ("EDMPrecond", SCORE), "classifier": ("EncoderUNetModel", _ENCODER | _TRUNK),
        "discriminator": ("EncoderUNetModel", _ENCODER | head),
    }  # fmt: skip
    torch.manual_seed(0)
    for role in roles:
        kind, keywords = described[role]
        net = nets.build(kind, **keywords)
        for name, parameter in net.named_parameters():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.data.add_(1)
        bundle = bundles.with_net(bundle, role, net, kind, keywords)
    bundles.write(bundle)
    return bundles.read(folder)


def export(*options: str) -> Result:
    return CliRunner().invoke(to_onnx.main, list(options))
