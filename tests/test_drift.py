"""`python -m benchmarks.drift` says how far a number format leads from float32."""

from click.testing import CliRunner

from benchmarks.drift import main


def drifts(precision: str) -> list[list[float]]:
    """sigma, error of a call, drift of the run: a row a step."""
    arguments = ["--workload", "tiny", "--count", "2", "--device", "cpu", "--precision", precision]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.strip("| ").split("|") for line in result.output.splitlines()[2:]]
    assert len(lines) == 5  # four steps and the images
    return [[float(cell) for cell in line[1:] if cell.strip()] for line in lines]


def test_drift_of_float32_from_itself_is_none() -> None:
    assert all(value == 0 for row in drifts("float32") for value in row[1:])


def test_drift_of_bfloat16_begins_with_the_first_call() -> None:
    rows = drifts("bf16")
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    assert all(0 < row[1] < 1 for row in rows[:-1])
    assert rows[0][-1] == 0 and all(0 < row[-1] < 1 for row in rows[1:])
