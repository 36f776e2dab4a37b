"""The door `python -m dgfast.sample`, compiled, with other kernels, with gradients reused, short of memory."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgfast import ops
from dgfast.graph import Function
from dgfast.sampler import Sampler
from tests.support.sample import draw, images_of, manifest_of


def test_sample_compiled_equals_eager(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ["--batch", "3", "--dg-weight", "1", "--dg-window", "0,1", "--solver", "euler"]  # one function to compile
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        result = draw(tiny, tmp_path / name, *job, *options)
        assert result.exit_code == 0, result.output
        manifest = manifest_of(tmp_path / name)
        assert manifest["job"]["runtime"] == manifest["runs"][0]["runtime"] == name
        assert (manifest["runs"][0]["compile_seconds"] > 0) is (name == "compiled")
    assert "compiled in" in result.output
    eager, compiled = images_of(tmp_path / "eager"), images_of(tmp_path / "compiled")
    assert eager.shape == compiled.shape and np.abs(eager.astype(int) - compiled).max() <= 1


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_sample_compile_without_a_compiler_is_one_line(tiny: Path, tmp_path: Path, no_compiler: None) -> None:
    result = draw(tiny, tmp_path / "out", "--compile")
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "needs a C++ compiler" in error and "apt install g++" in error and "--compile=try" in error
    assert not list((tmp_path / "out").glob("*"))


def test_sample_compile_try_without_a_compiler_samples_without(
    tiny: Path, plain: np.ndarray, tmp_path: Path, no_compiler: None
) -> None:
    result = draw(tiny, tmp_path / "out", "--compile=try", "--batch", "4")
    assert result.exit_code == 0, result.output
    (reason,) = [line for line in result.output.splitlines() if line.startswith("not compiled: ")]
    assert "needs a C++ compiler" in reason and "compiled in" not in result.output
    assert np.array_equal(images_of(tmp_path / "out"), plain)
    (run,) = manifest_of(tmp_path / "out")["runs"]
    assert run["runtime"] == "eager" and run["compile_seconds"] == 0


def test_sample_compile_try_compiles_where_it_can(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(function: Function, example: Sequence[torch.Tensor]) -> Function:
        built.append(example)
        return function

    monkeypatch.setattr("dgfast.runtimes.cpu.build.build", build)
    result = draw(tiny, tmp_path / "out", "--compile=try", "--batch", "3")
    assert result.exit_code == 0 and "compiled in" in result.output, result.output
    assert [tuple(x.shape) for x, _, _ in built] == [(3, 1, 8, 8)]  # the last batch of one image is filled up
    assert manifest_of(tmp_path / "out")["runs"][0]["runtime"] == "compiled" and len(images_of(tmp_path / "out")) == 4


def _spied_on(monkeypatch: pytest.MonkeyPatch, called: list[int]) -> None:
    """Let the kernel's launcher run the reference, here on the CPU, and write down that it was called."""

    def launch(*arguments: Any) -> Any:
        called.append(1)
        return ops.group_norm_silu_reference(*arguments), None, None

    monkeypatch.setattr("dgfast.kernels.group_norm_silu.group_norm_silu", launch)


def test_sample_kernels_choose_the_implementation(
    tiny: Path, plain: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    called: list[int] = []
    monkeypatch.setattr("dgfast.kernels.launch.devices", lambda: ("cuda", "cpu"))
    _spied_on(monkeypatch, called)
    result = draw(tiny, tmp_path / "reference", "--kernels", "reference")
    assert result.exit_code == 0 and not called, result.output
    assert np.array_equal(images_of(tmp_path / "reference"), plain)
    assert manifest_of(tmp_path / "reference")["job"]["kernels"] == "reference"
    result = draw(tiny, tmp_path / "triton", "--kernels", "triton")
    assert result.exit_code == 0, result.output
    assert called
    assert np.array_equal(images_of(tmp_path / "triton"), plain)
    assert manifest_of(tmp_path / "triton")["job"]["kernels"] == "triton"


def test_sample_kernels_of_cuda_are_refused_on_the_cpu(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = draw(tiny, tmp_path / "out", "--kernels", "triton")
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and "run on CUDA, not on cpu" in error and not (tmp_path / "out").exists()


def test_sample_kernels_without_triton_are_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" or ".kernels" in name]:
        if name.startswith(("triton", "dgfast.kernels")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    result = draw(tiny, tmp_path / "out", "--kernels", "triton")
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "Triton kernels cannot be imported" in error and "pip install 'dgfast[triton]'" in error
    assert not list((tmp_path / "out").glob("*"))


def test_sample_dg_every_saves_gradients_and_changes_little(tiny: Path, tmp_path: Path) -> None:
    job = ["--steps", "20"]
    guided = [*job, "--dg-window", "0,1.5", "--dg-weight", "50", "--dg-weight-2nd", "50"]
    runs = {
        "without": job,
        "every": guided,
        "hold": [*guided, "--dg-every", "2"],
        "linear": [*guided, "--dg-every", "2", "--dg-reuse", "linear"],
        "tenth": [*guided, "--dg-every", "10"],
    }
    gradients = {"without": 0, "every": 39, "hold": 20, "linear": 20, "tenth": 4}
    images = {}
    for name, options in runs.items():
        result = draw(tiny, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert f"39 score evaluations and {gradients[name]} guidance gradients" in result.output
        manifest = manifest_of(tmp_path / name)
        assert manifest["runs"][0]["guidance_gradients"] == gradients[name]
        images[name] = images_of(tmp_path / name).astype(int)
    settings = manifest["job"]["guidance"]
    assert settings["dg_every"] == 10 and settings["dg_reuse"] == "hold"
    distance = {name: np.abs(pixels - images["every"]).mean() for name, pixels in images.items()}
    assert 0 < distance["linear"] < distance["hold"] < 0.5 * distance["without"]
    assert distance["hold"] < distance["tenth"]


def test_sample_out_of_memory_goes_on_in_smaller_batches(
    tiny: Path, plain: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.__call__

    def limited(self: Sampler, seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(self, seeds, *rest)

    monkeypatch.setattr(Sampler, "__call__", limited)
    result = draw(tiny, tmp_path / "out", "--batch", "4")
    assert result.exit_code == 0, result.output
    assert "out of memory: going on with batches of 2 images" in result.output
    assert np.abs(images_of(tmp_path / "out").astype(int) - plain).max() <= 1
    assert manifest_of(tmp_path / "out")["runs"][0]["images"] == 4
