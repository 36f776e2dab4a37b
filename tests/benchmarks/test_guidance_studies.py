"""The studies `support` and `guidances`: what goes with what, and all guidances by their weights."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.studies import guidances, support


def test_support_of_a_module_of_ones_own_is_proved_cell_by_cell() -> None:
    result = CliRunner().invoke(support.main, ["--network", "your own module"])
    assert result.exit_code == 0, result.output
    row = result.output.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "your own module" and row[3] == "-"  # it shows no layers that could be perturbed
    errors = [float(error) for cell in (*row[1:3], row[4]) for error in cell.split(", ")]
    assert len(errors) == 6 and 0 < max(errors) < 2e-5


def test_support_refuses_a_proof_by_a_guidance_that_does_nothing() -> None:
    networks = support._networks("your own module")
    with pytest.raises(RuntimeError, match="change nothing of a Own"):
        support._error(networks.denoiser, [], lambda function, example: function)


def row(guidance: str, options: str, coverage: float) -> dict[str, Any]:
    return {"guidance": guidance, "options": options, "frechet": 0.2, "coverage": coverage, "precision": 1 - coverage}


def test_lines_of_guidances_begin_where_they_do_nothing(tmp_path: Path) -> None:
    rows = [row("unguided", "", 0.6), row("CFG", "--cfg-scale 5", 0.4), row("CFG 5, rescaled", "--cfg-rescale 1", 0.5)]
    assert guidances._origin("PAG", rows) == rows[:1] and guidances._origin("CFG 5, rescaled", rows) == rows[1:2]
    assert guidances._origin("CFG++", rows) == []
    guidances._plot(rows, tmp_path / "guidances.png")
    with Image.open(tmp_path / "guidances.png") as picture:
        assert picture.size == (1320, 715)
