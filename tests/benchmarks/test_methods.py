"""Whatever the guided function contains, the compiled and the ONNX runtime get: every method in both, against eager."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import golden, parity


@pytest.mark.parametrize("name", parity.METHODS)
def test_methods_draw_the_same_in_every_runtime(name: str) -> None:
    reused = parity.METHODS[name].guidance.dg_every > 1
    clipped = parity.METHODS[name].sampling.clip_denoised  # of x - sigma F at sigma 157, 6e-5 are left open by float32
    for row in parity.rows(name, ("compiled", "onnx" if reused else "file")):
        assert row.error < (3e-4 if clipped else 2e-5) and row.drift < 1e-4, row
        assert row.moved > 1e-2 or name == "one-step", f"the guidance does nothing, so nothing is compared: {row}"


def test_golden_networks_are_judged_in_each_runtime(
    own_golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("golden_fill.py", "dit_small_patch4.npz", "dg_vpsde.npz"):  # the last one has no network
        shutil.copy(own_golden_folder / name, tmp_path)
    done = CliRunner().invoke(golden.main, ["--golden", str(tmp_path)])
    assert done.exit_code == 0 and "dit_small_patch4" in done.output and "vpsde" not in done.output, done.output
    for name, runtime in golden.JUDGED.items():
        monkeypatch.setitem(golden.JUDGED, name, replace(runtime, tolerance=1e-12))
        assert CliRunner().invoke(golden.main, ["--golden", str(tmp_path)]).exit_code == 1, name
        monkeypatch.undo()
