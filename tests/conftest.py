"""Shared set-up: the golden folder, its recipe for weights, tiny networks, and the golden table after the run."""

import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch
from filelock import FileLock
from torch import nn

from dgfast import SamplingConfig, nets
from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.nets.discriminator import Discriminator

# The same examples in every run: a numeric law that fails, fails every time. No deadline: the machine may be busy.
hypothesis.settings.register_profile("dgfast", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("dgfast")

pytest.register_assert_rewrite("tests.support")

_OWN_FOLDER = Path(__file__).parent / "golden"

# Beside other workers a test has one core, and so have the processes that it starts: two threads on each of two workers
# would wait for one another at the end of every operation that they share.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")


def _golden_folder() -> Path:
    """The folder in the environment variable DGFAST_GOLDEN, or the one beside this file."""
    return Path(os.environ.get("DGFAST_GOLDEN", _OWN_FOLDER))


@cache
def _golden_fill() -> ModuleType:
    path = _golden_folder() / "golden_fill.py"
    spec = importlib.util.spec_from_file_location("golden_fill", path if path.is_file() else _OWN_FOLDER / path.name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_path" in metafunc.fixturenames:
        paths = sorted(_golden_folder().glob("*.npz"))
        if not paths:  # without parameters the test would not run, and the run would look green
            raise pytest.UsageError(f"no golden files (*.npz) in {_golden_folder()}; check DGFAST_GOLDEN")
        metafunc.parametrize("golden_path", paths, ids=[path.stem for path in paths])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    gc.freeze()  # a million objects that live as long as the run: the collector need not look at them again and again


@pytest.fixture(scope="session", autouse=True)
def deterministic_torch() -> Iterator[None]:
    """Repeatable kernels; this mode also fills `torch.empty` with NaN, so reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this run, on all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def made_once(shared_folder: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """(name, make) -> the folder of that name, which `make` has filled for all workers: what takes long to make."""

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = shared_folder / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                new = Path(tempfile.mkdtemp(dir=shared_folder))
                make(new)
                new.rename(path)
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder: Path) -> Iterator[None]:
    """Compiled code is shared among the tests of this run, on all workers, and with nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGFAST_CACHE_DIR", str(shared_folder / "dgfast"))
        yield


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return _golden_folder()


@pytest.fixture(scope="session")
def own_golden_folder() -> Path:
    """The repository's copy, for tests that need one certain file of it."""
    return _OWN_FOLDER


@pytest.fixture(scope="session")
def golden_fill() -> ModuleType:
    """The module that draws weights and inputs by name."""
    return _golden_fill()


@pytest.fixture
def golden_report(record_property: Callable[[str, object], None]) -> Callable[[str, int, float, float], None]:
    """(file, keys judged, largest error / tolerance, largest relative error) -> the table below."""

    def report(file: str, keys: int, ratio: float, relative: float) -> None:
        record_property("golden", (file, keys, ratio, relative))

    return report


@pytest.fixture(scope="session")
def filled_net() -> Callable[..., Any]:
    """(kind, keywords, prefix) -> that network with the recipe's weights, in eval mode, frozen; built once.

    Any, here and in the networks made of it: the kind names the class.
    """
    built: dict[str, nn.Module] = {}

    def net(kind: str, keywords: dict[str, Any], prefix: str) -> Any:
        key = repr((kind, sorted(keywords.items()), prefix))
        if key not in built:
            built[key] = _golden_fill().fill_(nets.build(kind, **keywords), prefix).eval().requires_grad_(False)
        return built[key]

    return net


@pytest.fixture(scope="session")
def tiny_net(filled_net: Callable[..., Any]) -> Callable[..., Any]:
    """(label_dim, kind, prefix, other keywords) -> a U-Net for 8 x 8 images that runs in a few milliseconds."""

    def net(label_dim: int = 0, kind: str = "EDMPrecond", prefix: str = "tiny/", **keywords: Any) -> Any:
        shape = {"img_resolution": 8, "img_channels": 1, "label_dim": label_dim}
        size = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
        return filled_net(kind, {"model_type": "SongUNet", **shape, **size, **keywords}, prefix)

    return net


@pytest.fixture(scope="session")
def tiny_sit(filled_net: Callable[..., Any]) -> Callable[..., Any]:
    """(label_dim, other keywords) -> a transformer of flow matching for 8 x 8 images, as quick."""

    def net(label_dim: int = 0, prefix: str = "tiny/sit/", **keywords: Any) -> Any:
        shape = {"img_resolution": 8, "img_channels": 1, "label_dim": label_dim}
        size = {"patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False}
        return filled_net("FlowPrecond", {"model_type": "SiT", **shape, **size, **keywords}, prefix)

    return net


@pytest.fixture(scope="session")
def tiny_discriminator(filled_net: Callable[..., Any]) -> Callable[..., Discriminator]:
    """(num_classes) -> a discriminator for the images of `tiny_net`."""

    def discriminator(num_classes: int = 0) -> Discriminator:
        common = {"model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 32}
        trunk = {"image_size": 8, "in_channels": 1, "out_channels": 10, "channel_mult": [1, 2], "resblock_updown": True}
        head = {"image_size": 4, "in_channels": 64, "out_channels": 1, "channel_mult": [1], "pool": "attention"}
        return Discriminator(
            filled_net("EncoderUNetModel", common | trunk, "tiny/trunk/"),
            filled_net("EncoderUNetModel", common | head | {"num_classes": num_classes}, "tiny/head/"),
        ).eval()

    return discriminator


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory, filled_net: Callable[..., Any]) -> Bundle:
    """Score network and generator for 8 x 8 images of three classes, which are exported in about a second."""
    shape = {"img_resolution": 8, "img_channels": 1, "label_dim": 3}
    score = {"model_type": "SongUNet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "score": ("EDMPrecond", {**shape, **score, "attn_resolutions": []}),
        "generator": ("Generator", {**shape, "latent_dim": 6, "channels": [16, 8]}),
    }
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "small", "small", {}, SamplingConfig(num_steps=4))
    for role, (kind, keywords) in kinds.items():
        bundle = bundles.with_net(bundle, role, filled_net(kind, keywords, f"bundle/{role}/"), kind, keywords)
    bundles.write(bundle)
    return bundles.read(bundle.folder)


@pytest.fixture(scope="session")
def small_discriminator(filled_net: Callable[..., Any]) -> Callable[[int], Discriminator]:
    """(classes) -> a discriminator of both parts with every kind of layer, as few of them as can be."""

    def discriminator(classes: int) -> Discriminator:
        common = {"model_channels": 16, "num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16}
        trunk = {"image_size": 8, "in_channels": 1, "out_channels": 4, "channel_mult": [1, 1], "resblock_updown": True}
        head = {"image_size": 4, "in_channels": 16, "out_channels": 1, "channel_mult": [1], "pool": "attention"}
        return Discriminator(
            filled_net("EncoderUNetModel", common | trunk, "small/trunk/"),
            filled_net("EncoderUNetModel", common | head | {"num_classes": classes}, "small/head/"),
        ).eval()

    return discriminator


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows come with the tests' reports, which is how they reach the process that prints from workers."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    table = sorted(row for report in reports for name, row in report.user_properties if name == "golden")
    if table:
        terminalreporter.section(f"goldens in {_golden_folder()}")
        width = max(len(row[0]) for row in table)
        terminalreporter.write_line(f"{'file':{width}}  keys  error / tolerance  relative error")
        for file, keys, ratio, relative in table:
            terminalreporter.write_line(f"{file:{width}}  {keys:4}  {ratio:17.4f}  {relative:14.1e}")
