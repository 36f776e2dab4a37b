"""`python -m dgfast.sample` on a pretended GPU, in a process of its own: no other test has imported what it needs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dgfast.bundle import Bundle
from dgfast.sample import main
from dgfast.sampler import Sampler
from tests.support.paths import ROOT
from tests.support.pretended_cuda import NAME, pretended_cuda
from tests.support.sample import images_of, manifest_of

# AOTInductor alone is stood in for: its code of a graph for the CPU would take a minute to compile.
_ON_CUDA = """
from contextlib import ExitStack
from unittest import mock

from dgfast.sample import main
from dgfast.sampler import Sampler
from tests.support.pretended_cuda import compiled, pretended_cuda

made = []
stand_ins = {
    "compile_missing": lambda pieces: made.extend(name for _, _, name in pieces),
    "compiled": lambda *graph: made.append(graph[-1]) or compiled(*graph),
}
with ExitStack() as stack:
    for name, stand_in in stand_ins.items():
        stack.enter_context(mock.patch(f"dgfast.runtimes.package.build.{name}", stand_in))
    stack.enter_context(pretended_cuda())
    main(standalone_mode=False)
print(made)
"""


_IN_BRANCHES = ["submod_first", "submod_branch1", "submod_branch0", "submod_last"]  # with a label and without


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "3", "--s-churn", "1", "--cfg-scale", "2"], 2 * _IN_BRANCHES),
        (["--one-step"], [""]),
    ],
    ids=["steps", "one step"],
)
def test_sample_on_a_gpu_draws_the_images_of_a_cpu(
    arguments: list[str], parts: list[str], small_bundle: Bundle, tmp_path: Path
) -> None:
    job, on_cpu, on_cuda = ["--bundle", str(small_bundle.folder), "--seeds", "0,1", *arguments], "cpu", "cuda"
    reference = CliRunner().invoke(main, [*job, "--device", "cpu", "--out", str(tmp_path / on_cpu)])
    assert reference.exit_code == 0, reference.output
    options = ["--compile", "--kernels", "reference", "--out", str(tmp_path / on_cuda)]
    done = subprocess.run([sys.executable, "-c", _ON_CUDA, *job, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, expected = (images_of(tmp_path / name).astype(int) for name in (on_cuda, on_cpu))
    assert abs(images - expected).max() <= 1 and np.ptp(images) > 100
    (ran,) = manifest_of(tmp_path / on_cuda)["runs"]
    assert (ran["device"], ran["runtime"]) == (f"cuda:0 ({NAME})", "compiled")
    assert done.stdout.splitlines()[-1] == str(parts)


def test_sample_on_a_gpu_is_estimated_by_its_own_batch(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere by a smaller one, because a call of it takes long."""
    batches: list[int] = []

    def a_second(sampler: Sampler, batch: int) -> float:
        batches.append(batch)
        return 1.0

    monkeypatch.setattr(Sampler, "estimate", a_second)
    job = ["--bundle", str(small_bundle.folder), "--seeds", "0-99", "--batch", "50", "--dry-run", "--out"]
    assert CliRunner().invoke(main, [*job, str(tmp_path), "--device", "cpu"]).exit_code == 0
    with pretended_cuda():
        done = CliRunner().invoke(main, [*job, str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert batches[0] < batches[1] == 50
