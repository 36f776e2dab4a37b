"""The colour bundle: small, documented, and what it draws stands on white in colours."""

import torch

import dgfast
from dgfast import bundle as bundles


def test_emoji32_is_small_and_documented() -> None:
    bundle = bundles.read("emoji32")
    files = [path for path in bundle.folder.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "README.md", "bundle.json", *(spec.file for spec in bundle.nets.values())
    }  # fmt: skip
    assert sum(path.stat().st_size for path in files) < 12e6
    assert len(bundle.class_names) == 9 and bundle.license and bundle.provenance
    card = " ".join((bundle.folder / "README.md").read_text().replace("\\\n", " ").split())
    for role in bundle.nets:
        assert bundle.metrics[role]["command"].removeprefix("dgfast train ") in card


def test_emoji32_draws_colours_on_white() -> None:
    sampling = dgfast.SamplingConfig(8, "dpmpp-2m")  # a network call a step
    guidance = dgfast.GuidanceConfig(autoguidance=2.0)
    images = dgfast.Sampler(dgfast.load("emoji32"), sampling, guidance)(range(8), [0, 0, 3, 3, 4, 4, 8, 8])
    corners = torch.stack([images[..., i, j] for i in (0, -1) for j in (0, -1)], -1)
    assert float((corners > 0.8).float().mean()) > 0.7
    colourful = (images.amax(1) - images.amin(1) > 0.5).float().mean((1, 2))  # grey has none
    assert float((colourful > 0.1).float().mean()) >= 0.75
