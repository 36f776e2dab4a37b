"""Whatever the guided function contains, the compiled and the ONNX runtime get: every method in both, against eager."""

import pytest

from benchmarks import parity


@pytest.mark.parametrize("name", parity.METHODS)
def test_methods_draw_the_same_in_every_runtime(name: str) -> None:
    reused = parity.METHODS[name].guidance.dg_every > 1
    clipped = parity.METHODS[name].sampling.clip_denoised  # of x - sigma F at sigma 157, 6e-5 are left open by float32
    for row in parity.rows(name, ("compiled", "onnx" if reused else "file")):
        assert row.error < (3e-4 if clipped else 2e-5) and row.drift < 1e-4, row
        assert row.moved > 1e-2 or name == "one-step", f"the guidance does nothing, so nothing is compared: {row}"
