"""A bundle, its denoiser and the files that are exported of it, made once by all workers."""

from collections.abc import Callable
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
def denoiser_file(bundle: Bundle, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def make(out: Path) -> None:
        done = export("--bundle", str(bundle.folder), "--out", str(out))
        assert done.exit_code == 0, done.output

    return made_once("denoiser", make) / "small-denoiser-dynamic-float32.onnx"


@pytest.fixture(scope="session")
def step_file(bundle: Bundle, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def make(out: Path) -> None:
        options = ["--what", "step", "--batch", "40", "--dg-weight-2nd", "1"]
        done = export("--bundle", str(bundle.folder), *options, "--out", str(out))
        assert done.exit_code == 0, done.output

    return made_once("step", make) / "small-step-b40-float32.onnx"
