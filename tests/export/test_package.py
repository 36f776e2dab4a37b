"""The door `python -m dgfast.export.to_package`: what it proves, what it leaves, and who runs the file."""

import json
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from dgfast import devices
from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.export import package_file, to_package
from dgfast.export.joint_graph import joint
from dgfast.export.parity import ParityError
from dgfast.image_folder import read_images
from dgfast.networks import load
from dgfast.runtimes.package.engine import PackageEngine, add_self_test
from dgfast.sample import main as sample
from tests.export.test_onnx_file import ABOUT, subject
from tests.support.export import write_bundle
from tests.support.paths import ROOT

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
OPTIONS = ["--device", "cpu", "--what", "step", "--solver", "euler", "--batch", "40"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of two networks, for each is half a minute of compiling."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "small", ("score", "discriminator"))


@pytest.fixture(scope="module")
def step_package(bundle: Bundle, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def make(out: Path) -> None:
        done = CliRunner().invoke(to_package.main, ["--bundle", str(bundle.folder), *OPTIONS, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert "all 4 steps, share of the pixel range" in done.output

    return made_once("step-package", make) / "small-step-b40-float32-cpu.pt2"


def test_package_is_the_step_and_says_so(step_package: Path, bundle: Bundle) -> None:
    engine = PackageEngine(step_package)
    engine.self_test()
    reference = joint(load(bundle), bundle.sampling, bundle.guidance, "step")
    case = reference.case("", [1.0] * 40, seed=5, weights={"dg_weight": 3.0})
    off = reference.case("", [1.0] * 40, seed=5, weights={"dg_weight": 0.0})
    guided, plain = (engine(c.inputs)["x_next"] for c in (case, off))
    assert (guided - plain).abs().max() > 1e-3, "the gradient is not inside"
    assert engine.metadata["what"] == "step" and json.loads(engine.metadata["sampling"])["solver"] == "euler"
    assert (engine.metadata["weights_sha256"], engine.batch) == (bundle.fingerprint(), 40)
    assert json.loads(step_package.with_suffix(".parity.json").read_text())["passed"] is True


def test_package_is_made_and_compared_in_float32_alone(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA torch rounds convolutions by itself: such a package would differ from its reference."""
    held: list[dict[str, str]] = []

    def export(*_: object, **__: object) -> None:
        held.append(devices.arithmetic())
        raise UserError("that is enough")

    monkeypatch.setattr(package_file, "export", export)
    done = CliRunner().invoke(to_package.main, ["--bundle", str(bundle.folder), *OPTIONS, "--out", str(tmp_path)])
    assert done.exit_code == 2 and held == [{"products": "float32", "convolutions": "float32"}], done.output


def test_package_draws_without_python(step_package: Path, tmp_path: Path) -> None:
    """The example, built as its own first lines say."""
    source = ROOT / "examples/package_only.cpp"
    text = source.read_text()
    assert len(text.splitlines()) <= 60
    command = "".join(line.removeprefix("//").rstrip("\\") for line in text.splitlines()[4:6])
    assert command.split()[0] == "g++"
    command = command.replace("$TORCH", torch.__path__[0]).replace("examples/package_only.cpp", str(source))
    subprocess.run([*command.split(), "-O0"], cwd=tmp_path, check=True)
    picture = tmp_path / "digits.pgm"
    run = [str(tmp_path / "package_only"), str(step_package), str(picture)]
    subprocess.run(run, env={}, check=True)
    with Image.open(picture) as image:
        assert image.size == (80, 32) and np.asarray(image).std() > 1
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(step_package.read_bytes()[:3000])
    for arguments in ([], [str(damaged), str(picture)], [str(step_package), str(tmp_path / "none/digits.pgm")]):
        done = subprocess.run([run[0], *arguments], env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_package_as_engine_samples_the_images_of_eager(tmp_path: Path) -> None:
    """The one-step generator's, which is compiled in no time."""
    from dgfast import bundle as bundles
    from dgfast import nets

    keywords = {"img_resolution": 8, "img_channels": 1, "latent_dim": 4, "style_dim": 8, "channels": [8, 8]}
    torch.manual_seed(0)
    made = Bundle(tmp_path / "one", "one", {})
    net = nets.build("Generator", **keywords)
    bundles.write(bundles.with_net(made, "generator", net, "Generator", keywords))
    exported = ["--bundle", str(made.folder), "--what", "generator", "--device", "cpu", "--batch", "3"]
    done = CliRunner().invoke(to_package.main, [*exported, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    engine = ["--runtime", "package", "--engine", str(tmp_path / "one-generator-b3-float32-cpu.pt2")]
    shared = ["--bundle", str(made.folder), "--one-step", "--device", "cpu", "--seeds", "0-4", "--format", "npz"]
    for out, how in {"eager": [], "package": engine}.items():
        done = CliRunner().invoke(sample, [*shared, *how, "--batch", "3", "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
    images = [read_images(tmp_path / out)[0].astype(int) for out in ("eager", "package")]
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 1
    done = CliRunner().invoke(sample, [*shared, *engine, "--batch", "2", "--out", str(tmp_path / "other")])
    assert done.exit_code == 2 and "made for batches of 3, not 2; give --batch 3" in done.output


def test_package_refuses_other_arguments(step_package: Path, bundle: Bundle) -> None:
    engine = PackageEngine(step_package)
    reference = joint(load(bundle), bundle.sampling, bundle.guidance, "step")
    inputs = dict(reference.case("", [1.0] * 40, seed=5).inputs)
    for change, message in (
        ({"x": inputs["x"][:3]}, "made for batches of 40, not 3"),
        ({"class_labels": inputs["class_labels"][:, :3]}, r"class_labels has shape \[40, 3\], not \[40, 10\]"),
        ({"dg_weight": torch.ones(2)}, r"dg_weight has shape \[2\], not \[1\]"),
    ):
        with pytest.raises(UserError, match=message):
            engine({**inputs, **change})
    with pytest.raises(UserError, match="its inputs are x, sigma"):
        engine({"x": inputs["x"]})


def test_package_computes_in_the_precision_that_it_was_proved_in(
    step_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of any `precision`, torch's own default would round convolutions on CUDA."""
    engine = PackageEngine(step_package)
    seen: list[dict[str, str]] = []

    def package(*_: Tensor) -> list[Tensor]:
        seen.append(devices.arithmetic())
        return [torch.ones(1) for _ in engine.outputs]

    monkeypatch.setattr(engine, "_package", package)
    engine({name: torch.ones(shape) for name, (shape, _) in engine.inputs.items()})
    assert seen == [{"products": "float32", "convolutions": "float32"}] != [devices.arithmetic()]


def test_package_notices_that_it_computes_something_else(step_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.pt2"
    path.write_bytes(step_package.read_bytes())
    engine = PackageEngine(path)
    with zipfile.ZipFile(path) as archive:
        assert any(name.endswith("dgfast/self_test.npz") for name in archive.namelist())
    inputs = {name: torch.ones(shape) for name, (shape, _) in engine.inputs.items()}
    results = engine(inputs)
    add_self_test(path, inputs, {name: 2 * x for name, x in results.items()})
    with pytest.raises(UserError, match="its self-test fails here: output x_next differs by"):
        PackageEngine(path).self_test()


def test_package_that_was_there_stays_when_its_successor_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "f.pt2"
    path.write_bytes(b"proved before")
    monkeypatch.setattr(package_file, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        package_file.export(
            subject(), subject(), path, batch=3, dtype="float32", device=CPU, metadata=dict(ABOUT, what="denoiser")
        )
    assert path.read_bytes() == b"proved before" and [*tmp_path.iterdir()] == [path]


class Engine:
    """In place of an opened package, which takes seconds to compile: it agrees with `subject`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        pass

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return subject()(inputs)

    def self_test(self) -> None:
        pass


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """What is opened, though nothing is compiled."""
    for name, stand_in in (("write", lambda *_: None), ("add_self_test", lambda *_: None), ("PackageEngine", Engine)):
        monkeypatch.setattr(package_file, name, stand_in)
    return Engine


def test_package_that_was_there_keeps_its_report_when_its_successor_is_stopped_late(
    tmp_path: Path, opened: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the user, in its self-test."""

    def stopped(_: Engine) -> None:
        raise KeyboardInterrupt

    path, report = tmp_path / "f.pt2", tmp_path / "f.parity.json"
    path.write_bytes(b"proved before")
    report.write_bytes(b"of what was proved before")
    monkeypatch.setattr(opened, "self_test", stopped)
    with pytest.raises(KeyboardInterrupt):
        package_file.export(
            subject(), subject(), path, batch=3, dtype="float32", device=CPU, metadata=dict(ABOUT, what="denoiser")
        )
    assert path.read_bytes() == b"proved before" and report.read_bytes() == b"of what was proved before"
    assert sorted(tmp_path.iterdir()) == [report, path]


def test_package_that_is_wrong_is_removed(tmp_path: Path, opened: type[Engine]) -> None:
    path = tmp_path / "f.pt2"
    path.write_bytes(b"another's report would lie beside it")
    reference = subject(lambda x, sigma, weight: (weight.view(-1, 1, 1, 1) * x, 0 * sigma))
    with pytest.raises(ParityError):
        package_file.export(
            subject(), reference, path, batch=3, dtype="float32", device=CPU, metadata=dict(ABOUT, what="denoiser")
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.parity.json", "f.parity.txt"]


def test_package_needs_its_networks(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "plain", ("score",))
    options = ["--bundle", str(bundle.folder), "--what", "generator", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(to_package.main, options)
    assert done.exit_code == 2 and "generator" in done.output and not [*tmp_path.glob("*.pt2")]
