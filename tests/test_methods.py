"""Whatever the guided function contains, the compiled and the ONNX runtime get: every method in both, against eager."""

import pytest

from benchmarks import parity
from dgfast.runtimes import regions


@pytest.mark.parametrize("name", parity.METHODS)
def test_methods_draw_the_same_in_every_runtime(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_WORTHWHILE", 1e9)  # the lowered graph itself: compiling regions takes a minute
    reused = parity.METHODS[name].guidance.dg_every > 1
    for row in parity.rows(name, ("compiled", "onnx" if reused else "file")):
        assert row.error < 1e-4 and row.drift < 1e-4, row
        assert row.moved > 1e-2 or name == "one-step", f"the guidance does nothing, so nothing is compared: {row}"
