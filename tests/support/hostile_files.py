"""Hostile files by hand: little to download, and endless work or memory for a reader that believes them.

`ATTACKS` names each: a function that writes it into a folder and returns its path, whose ending tells the reader; see
`read`.
"""

from pathlib import Path

import torch

from dgfast import bundle
from dgfast.checkpoints import network, torch_file
from tests.support import hostile_bundles as hostile_bundles  # adds its attacks to those of `hostile_pickles`
from tests.support.hostile_pickles import ATTACKS as ATTACKS


def read(path: Path) -> None:
    """As a user would who was given the file."""

    match path.suffix:
        case ".pkl":
            network.read(path, "score", None, {}, None)
        case ".pt":
            content = torch_file.read(path)
            if isinstance(content, dict) and any(isinstance(value, torch.Tensor) for value in content.values()):
                network.read(path, "score", None, {"num_heads": 2}, None)
                network.read(path, "classifier", None, {}, None)
        case _:
            content = bundle.read(path)
            content.fingerprint()
            content.load("score")
