"""The door `python -m dgfast.sample`: bad input is one line and costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.sample import draw


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bundle", "nowhere"], "unknown bundle 'nowhere'"),
        (["--labels", "3"], "label 3 is out of range; this network knows classes 0 to 2"),
        (["--sigma-min", "90"], "--sigma-min 90 must lie above 0 and below --sigma-max 80"),
        (["--sigma-min", "5", "--sigma-max", "2"], "--sigma-min 5 must lie above 0 and below --sigma-max 2"),
        (["--steps", "1"], "at least 2 steps"),
        (["--grid", "iddpm", "--steps", "2000"], "lower --steps 2000"),
        (["--solver", "dpmpp-2m", "--s-churn", "5"], "dpmpp-2m"),
        (["--respacing", "10"], "--respacing is the whole grid: leave out --steps"),
        (["--eta", "0.5"], "eta 0.5: heun has none, which is the noise of ddim"),
        (["--solver", "ddpm", "--s-churn", "5"], "ddpm takes no churn"),
        (["--solver", "ddpm", "--dg-weight", "1", "--boosting"], "boosting does not go with ddpm"),
        (["--dg-schedule", "0.5"], "dg_schedule ((0.5,),): give at most 20 pairs of numbers"),
        (["--dg-schedule", "0.5:1,0.1:2"], "by rising tau"),
        (["--dg-window", "1,0.5"], "two numbers, the first below the second"),
        (["--dg-window", "1"], "expected two numbers"),
        (["--boosting"], "boosting needs dg_weight"),
        (["--dg-every", "0"], "dg_every 0 must be a whole number, at least 1"),
        (["--dg-every", "1.5"], "'1.5' is not a valid integer"),
        (["--dg-reuse", "cubic"], "'cubic' is not one of 'hold', 'linear'"),
        (["--dg-weight", "1", "--dg-every", "2", "--boosting"], "boosting judges every call by its own log-ratio"),
        (["--compile=maybe"], "'maybe' is not one of 'always', 'try'"),
        (["--kernels", "cuda"], "'cuda' is not one of 'auto', 'reference', 'triton'"),
        (["--diversity", "-1"], "diversity is at least 0"),
        (
            ["--observe-std", "0.1"],
            "observe_std does nothing without observe, which turns guidance by an observation on",
        ),
        (["--observe-weight", "2"], "observe_weight does nothing without observe"),
        (["--pag-layers", "x"], "pag_layers does nothing without pag_scale"),
        (["--seg-blur", "2"], "seg_blur does nothing without seg_scale"),
        (["--slg-interval", "1,2"], "slg_interval does nothing without slg_scale"),
        (["--normalize", "max_abs"], "normalize does nothing without diversity or fidelity"),
        (["--perceptual"], "perceptual does nothing without diversity"),
        (["--target-class", "1", "--fidelity", "1"], "target_class does nothing without diversity"),
        (["--base-class", "0", "--diversity", "1"], "base_class does nothing without fidelity"),
        (["--diversity", "1", "--target-class", "3"], "target class 3 is out of range; the classifier knows classes 0"),
        (["--fidelity", "1", "--base-class", "-1"], "base_class -1 must be a whole number, at least 0"),
        (["--diversity", "1", "--classifier-scale", "1"], "weigh one and the same gradient"),
        (["--diversity", "1", "--normalize", "l1"], "'l1' is not one of"),
        (["--rho", "nan"], "not a finite number"),
        (["--rho", "-1"], "rho must be above 0"),
        (["--rho", "1e-300"], "--rho 1e-300: sigma^(1/rho) is no number any more; raise --rho"),
        (
            ["--labels", "99999999999999999999"],
            "label 99999999999999999999 is out of range; this network knows classes 0 to 2",
        ),
        (["--device", "meta"], "--device meta: tensors have no values there"),
        (["--seeds", "3-1"], "ends before it begins"),
        (["--seeds", "x"], "expected integers and ranges"),
        (["--device", "cuda"], "--device cuda: not usable here"),
        (["--device", "nonsense"], "--device nonsense: not usable here"),
        (["--format", "jpeg"], "'jpeg' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_sample_bad_input_is_one_line_and_writes_nothing(
    tiny: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    if options[-1] == "cuda" and torch.cuda.is_available():
        options[-1] = "cuda:99"
        message = message.replace("cuda", "cuda:99")
    result = draw(tiny, tmp_path / "out", *options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "role"),
    [
        (["--dg-weight", "1"], "discriminator"),
        (["--dg-weight-2nd", "1"], "discriminator"),
        (["--classifier-scale", "1"], "classifier"),
        (["--autoguidance", "2"], "reference"),
        (["--diversity", "2"], "classifier"),
        (["--fidelity", "2"], "classifier"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_sample_missing_network_is_named(score_only: Path, tmp_path: Path, options: list[str], role: str) -> None:
    result = draw(score_only, tmp_path / "out", *options)
    assert result.exit_code == 2 and "bundle score-only has no" in result.output and role in result.output
    assert not (tmp_path / "out").exists()


def test_sample_used_out_is_refused_and_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = draw(tiny, tmp_path)
    assert result.exit_code == 2 and "already holds mine.txt" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_sample_nan_stops_and_names_step_and_sigma(tiny: Path, tmp_path: Path) -> None:
    result = draw(tiny, tmp_path / "out", "--dg-weight", "1e300")
    assert result.exit_code == 2 and "NaN or infinite at step" in result.output and "sigma" in result.output
    assert not list((tmp_path / "out").glob("*.npz"))


def test_sample_runs_as_a_module_and_help_is_quick_to_import() -> None:
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('dgfast.sample', run_name='__main__')\n"
    code += "except SystemExit as stop: assert stop.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dg-weight" in done.stdout
