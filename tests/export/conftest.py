"""A bundle, its denoiser and the files that are exported of it, made once."""

from pathlib import Path

import pytest

from dgfast.bundle import Bundle
from dgfast.export.joint_graph import joint
from dgfast.export.subject import Joint
from dgfast.networks import load
from tests.support.export import export, write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "small", ("score", "classifier", "discriminator"))


@pytest.fixture(scope="session")
def subject(bundle: Bundle) -> Joint:
    return joint(load(bundle), bundle.sampling, bundle.guidance, "denoiser")


@pytest.fixture(scope="session")
def denoiser_file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("denoiser")
    done = export("--bundle", str(bundle.folder), "--out", str(out))
    assert done.exit_code == 0, done.output
    return out / "small-denoiser-dynamic-float32.onnx"


@pytest.fixture(scope="session")
def step_file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("step")
    options = ["--what", "step", "--batch", "40", "--dg-weight-2nd", "1"]
    done = export("--bundle", str(bundle.folder), *options, "--out", str(out))
    assert done.exit_code == 0, done.output
    return out / "small-step-b40-float32.onnx"
