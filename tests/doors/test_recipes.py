"""CONTRIBUTING's recipes: a solver, a runtime and a network are everywhere after the one entry that a recipe names."""

import json
from pathlib import Path

import numpy as np
import onnx

from tests.support import warm_python

_ENTRIES = """
import torch
from dgfast import bundle as bundles, nets, runtimes, solvers
from dgfast.bundle import Bundle
from dgfast.nets.song_unet import SongUNet
from dgfast.runtimes import Runtime
from dgfast.solvers import Euler

class Forward(Euler):
    name = "forward"

class TwinUNet(SongUNet):
    pass

solvers.SOLVERS["forward"] = Forward
runtimes.RUNTIMES["careful"] = Runtime("careful", lambda function, example: function)
nets._RAW["TwinUNet"] = TwinUNet

from dgfast.export.to_onnx import main as export
from dgfast.sample import main as sample

torch.manual_seed(0)
keywords = {"img_resolution": 8, "img_channels": 1, "model_channels": 16, "channel_mult": [1], "num_blocks": 1,
            "attn_resolutions": []}
for model_type in ("SongUNet", "TwinUNet"):
    torch.manual_seed(0)
    net = nets.build("EDMPrecond", model_type=model_type, **keywords)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    bundle = Bundle(bundles.Path(model_type), model_type, {})
    bundles.write(bundles.with_net(bundle, "score", net, "EDMPrecond", keywords | {"model_type": model_type}))
shared = ["--device", "cpu", "--seeds", "0-2", "--steps", "4", "--format", "npz"]
for bundle, solver, runtime in (
    ("SongUNet", "euler", "eager"), ("TwinUNet", "euler", "eager"),
    ("SongUNet", "forward", "eager"), ("SongUNet", "euler", "careful"),
):
    out = f"{bundle}-{solver}-{runtime}"
    sample([*shared, "--bundle", bundle, "--solver", solver, "--runtime", runtime, "--out", out], standalone_mode=False)
export(["--bundle", "TwinUNet", "--what", "step", "--solver", "forward", "--out", "exported"], standalone_mode=False)
"""


def test_recipes_need_no_other_line(tmp_path: Path) -> None:
    """Each twin draws the images of the one that it is a copy of; the new solver's step is exported and proved."""
    made = warm_python.run("-c", _ENTRIES, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    drawn = {path.parent.name: np.load(path)["images"] for path in tmp_path.glob("*/images-*.npz")}
    assert len(drawn) == 4
    first = drawn["SongUNet-euler-eager"]
    assert first.std() > 0
    assert all(np.array_equal(images, first) for images in drawn.values())
    (file,) = (tmp_path / "exported").glob("*step*.onnx")
    said = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(said["sampling"])["solver"] == "forward"
