"""A bundle's fingerprint tells apart all that changes what is sampled: another's engine would be taken for its own."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgfast import bundle as bundles
from dgfast.bundle import Bundle, NetSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = Bundle(tmp_path / "b", "b", {})
    for role, kind in {"score": "EDMPrecond", "classifier": "EncoderUNetModel", "features": "FeatureNet"}.items():
        made = bundles.with_tensors(made, role, {"w": torch.ones(3)}, kind, {"sigma_data": 0.5}, "linear")
    bundles.write(made)
    return made


def with_spec(bundle: Bundle, role: str, change: Callable[[NetSpec], NetSpec]) -> Bundle:
    return replace(bundle, nets={**bundle.nets, role: change(bundle.nets[role])})


@pytest.mark.parametrize("role", ["score", "classifier"])
@pytest.mark.parametrize(
    "change",
    [
        lambda spec: replace(spec, kind="VPPrecond"),
        lambda spec: replace(spec, keywords={"sigma_data": 1.0}),
        lambda spec: replace(spec, keywords={"sigma_data": 0.5, "label_dim": 3}),
        lambda spec: replace(spec, time_schedule="cosine"),
        lambda spec: replace(spec, time_schedule=None),
    ],
    ids=["kind", "value of a keyword", "another keyword", "schedule", "no schedule"],
)
def test_fingerprint_depends_on_the_description(
    bundle: Bundle, role: str, change: Callable[[NetSpec], NetSpec]
) -> None:
    assert with_spec(bundle, role, change).fingerprint() != bundle.fingerprint()


@pytest.mark.parametrize("role", ["score", "classifier"])
def test_fingerprint_depends_on_every_byte_of_the_weights(bundle: Bundle, role: str) -> None:
    before, path = bundle.fingerprint(), bundle.folder / f"{role}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert bundle.fingerprint() != before


def test_fingerprint_depends_on_who_has_which_role(bundle: Bundle) -> None:
    without = replace(bundle, nets={"score": bundle.nets["score"]})
    renamed = replace(bundle, nets={"score": bundle.nets["score"], "reference": bundle.nets["classifier"]})
    found = {b.fingerprint() for b in (bundle, without, renamed)}
    assert len(found) == 3


def test_fingerprint_is_the_same_wherever_and_whatever_it_is_called(bundle: Bundle, tmp_path: Path) -> None:
    """Nor do the networks' order, the defaults of sampling, and what the metrics see matter."""
    shutil.copytree(bundle.folder, tmp_path / "copy")
    copy = replace(
        bundle, folder=tmp_path / "copy", name="other", license="CC0", metrics={"fid": 1.0},
        nets=dict(reversed(bundle.nets.items())),
    )  # fmt: skip
    assert copy.fingerprint() == bundle.fingerprint() == bundles.read(bundle.folder).fingerprint()
    (copy.folder / "features.safetensors").write_bytes(b"anything")
    assert copy.fingerprint() == bundle.fingerprint()
    assert len(bundle.fingerprint()) == 64
