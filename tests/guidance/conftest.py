"""A classifier small enough to compile."""

from collections.abc import Callable
from typing import Any

import pytest

from dgfast.nets.discriminator import NoisyClassifier


@pytest.fixture(scope="session")
def tiny_classifier(filled_net: Callable[..., Any]) -> NoisyClassifier:
    keywords = {"image_size": 8, "in_channels": 1, "out_channels": 3, "model_channels": 16, "num_res_blocks": 1}
    more = {"attention_resolutions": [], "num_head_channels": 16, "channel_mult": [1, 1], "pool": "attention"}
    return NoisyClassifier(filled_net("EncoderUNetModel", keywords | more, "low/classifier/"))
