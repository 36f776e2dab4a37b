"""The door `python -m dgfast.sample`: every option does something, and bad input costs nothing."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from dgfast import bundle as bundles
from dgfast import nets, ops
from dgfast.bundle import Bundle
from dgfast.image_folder import read_images
from dgfast.nets.discriminator import Discriminator
from dgfast.sample import main
from dgfast.sampler import Sampler

_SCORE = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_ENCODER = {"num_res_blocks": 1, "attention_resolutions": [], "num_head_channels": 16, "model_channels": 16}
_TRUNK = {"image_size": 8, "in_channels": 1, "out_channels": 3, "channel_mult": [1, 2], "resblock_updown": True}
_HEAD = {"image_size": 4, "in_channels": 32, "out_channels": 1, "channel_mult": [1], "num_classes": 3}


def _randomise(net: torch.nn.Module) -> torch.nn.Module:
    """Networks are born with zeroed last layers, which would hide every guidance."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def _centre(trunk: torch.nn.Module, head: torch.nn.Module) -> None:
    """Shift a random head's logits to both sides of 0 around time 0.6, as boosting needs."""
    with torch.no_grad():
        rows = torch.eye(3)[torch.arange(60) % 3]
        logits = Discriminator(trunk, head)(torch.randn(60, 1, 8, 8), torch.full((60,), 0.6), rows)
        head.get_parameter("out.3.bias").sub_(logits.median())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every role, for 8 x 8 images of 3 classes."""
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "tiny", "tiny", {})
    trunk: torch.nn.Module | None = None
    for role, kind, keywords in (
        ("score", "EDMPrecond", _SCORE),
        ("reference", "EDMPrecond", _SCORE | {"channel_mult": [2]}),
        ("classifier", "EncoderUNetModel", _ENCODER | _TRUNK),
        ("discriminator", "EncoderUNetModel", _ENCODER | _HEAD),
    ):
        net = _randomise(nets.build(kind, **keywords))
        trunk = net if role == "classifier" else trunk
        if role == "discriminator":
            _centre(trunk, net)
        bundle = bundles.with_net(bundle, role, net, kind, keywords)
    bundles.write(bundle)
    return bundle.folder


@pytest.fixture(scope="module")
def score_only(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same score network and nothing else."""
    net = nets.build("EDMPrecond", **_SCORE)
    folder = tmp_path_factory.mktemp("bundles") / "score-only"
    bundles.write(bundles.with_net(Bundle(folder, "score-only", {}), "score", net, "EDMPrecond", _SCORE))
    return folder


def _run(bundle: Path, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle), "--seeds", "0-3", "--steps", "3", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *options])


def _images(out: Path) -> np.ndarray:
    return read_images(out)[0]


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Images of the tiny bundle without guidance."""
    out = tmp_path_factory.mktemp("plain") / "out"
    result = _run(tiny, out)
    assert result.exit_code == 0, result.output
    return _images(out)


def test_sample_writes_grid_shards_and_manifest(tiny: Path, tmp_path: Path) -> None:
    result = _run(tiny, tmp_path / "out", "--batch", "3", "--labels", "2,0", "--dg-weight", "1")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (16, 16)
    shards = []
    for path in sorted((tmp_path / "out").glob("*.npz")):
        with np.load(path) as file:
            shards.append(dict(file))
    assert [shard["seeds"].tolist() for shard in shards] == [[0, 1, 2], [3]]
    assert [shard["labels"].tolist() for shard in shards] == [[2, 0, 2], [0]]
    assert all(shard["images"].dtype == np.uint8 and shard["images"].shape[1:] == (8, 8, 1) for shard in shards)
    manifest = _manifest(tmp_path / "out")
    (run,) = manifest["runs"]
    assert manifest["job"]["seeds"] == "0-3" and manifest["job"]["labels"] == "2,0" and run["score_evaluations"] == 5
    assert run["guidance_gradients"] == run["guided_calls"] == 2  # the third level lies below the window
    assert manifest["job"]["guidance"]["dg_weight"] == 1.0 and run["seconds"] > 0
    last = result.output.strip().splitlines()[-1]
    assert "4 images" in last and "images/s" in last and "5 score evaluations and 2 guidance gradients" in last


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "5"], ["--solver", "euler"], ["--solver", "dpmpp-2m"], ["--solver", "ddpm"],
        ["--solver", "ddim"], ["--solver", "ddim", "--eta", "1"], ["--solver", "ddpm", "--fixed-variance", "large"],
        ["--dg-weight", "5", "--dg-schedule", "0.5:0,0.9:1"],
        ["--classifier-scale", "5", "--classifier-schedule", "0.2:1,0.9:3"], ["--grid", "ve"], ["--grid", "iddpm"],
        ["--schedule", "ve"], ["--scaling", "vp"], ["--sigma-min", "0.1"], ["--sigma-max", "20"], ["--rho", "3"],
        ["--alpha", "0.5"], ["--s-churn", "2"], ["--labels", "1"], ["--dg-weight", "5"],
        ["--dg-weight-2nd", "5"], ["--classifier-scale", "5"], ["--cfg-scale", "2"], ["--autoguidance", "2"],
        ["--diversity", "5"], ["--fidelity", "5"],
        ["--dtype", "bf16"], ["--seeds", "10-13"],
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_sample_every_option_changes_the_images(
    tiny: Path, plain: np.ndarray, tmp_path: Path, options: list[str]
) -> None:
    result = _run(tiny, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert not np.array_equal(_images(tmp_path / "out"), plain)


@pytest.mark.parametrize(
    ("base", "option"),
    [
        (["--s-churn", "2"], ["--s-noise", "1.5"]),
        (["--s-churn", "2"], ["--s-min", "10"]),
        (["--s-churn", "2"], ["--s-max", "10"]),
        (["--dg-weight", "5"], ["--dg-window", "0.5,1"]),
        (["--dg-weight", "5"], ["--boosting"]),
        (["--dg-weight", "5"], ["--dg-every", "2"]),
        (["--dg-weight", "5", "--dg-every", "2"], ["--dg-reuse", "linear"]),
        (["--dg-weight", "5", "--dg-window", "0.541,1", "--boosting", "--steps", "12"], ["--published-window"]),
        (["--cfg-scale", "3"], ["--guidance-interval", "0.5,10"]),
        (["--diversity", "3"], ["--perceptual"]),
        (["--diversity", "3"], ["--normalize", "sample_l2"]),
        (["--diversity", "3"], ["--target-class", "1"]),
        (["--fidelity", "3"], ["--clean-time", "0"]),
        (["--fidelity", "3"], ["--base-class", "1"]),
    ],
    ids=lambda options: " ".join(options),
)
def test_sample_options_of_options_change_the_images(
    tiny: Path, tmp_path: Path, base: list[str], option: list[str]
) -> None:
    for name, options in (("without", base), ("with", base + option)):
        result = _run(tiny, tmp_path / name, "--steps", "6", "--seeds", "0-15", *options)
        assert result.exit_code == 0, result.output
    assert not np.array_equal(_images(tmp_path / "without"), _images(tmp_path / "with"))


def test_sample_batch_size_leaves_the_images_alone(tiny: Path, plain: np.ndarray, tmp_path: Path) -> None:
    assert _run(tiny, tmp_path / "out", "--batch", "1").exit_code == 0
    assert np.abs(_images(tmp_path / "out").astype(int) - plain).max() <= 1


def test_sample_bundle_defaults_hold_unless_overridden(tiny: Path, tmp_path: Path) -> None:
    described = json.loads((tiny / "bundle.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny.glob("*.safetensors"):
        (copy / path.name).write_bytes(path.read_bytes())
    described |= {"sampling": {"num_steps": 4}, "guidance": {"dg_weight": 2.0, "dg_window": [0.1, 1.0]}}
    (copy / "bundle.json").write_text(json.dumps(described))
    base = ["--bundle", str(copy), "--seeds", "0", "--device", "cpu"]
    assert CliRunner().invoke(main, [*base, "--out", str(tmp_path / "a")]).exit_code == 0
    assert CliRunner().invoke(main, [*base, "--dg-weight", "0", "--out", str(tmp_path / "b")]).exit_code == 0
    assert _manifest(tmp_path / "a")["job"]["sampling"]["num_steps"] == 4
    assert _manifest(tmp_path / "a")["job"]["guidance"]["dg_weight"] == 2.0
    assert _manifest(tmp_path / "b")["runs"][0]["guidance_gradients"] == 0


# Compiled, with other kernels, with gradients reused ------------------------------------------------------------------
def test_sample_compiled_equals_eager(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ["--batch", "3", "--dg-weight", "1", "--dg-window", "0,1", "--solver", "euler"]  # one function to compile
    for name, options in (("eager", []), ("compiled", ["--compile"])):
        result = _run(tiny, tmp_path / name, *job, *options)
        assert result.exit_code == 0, result.output
        manifest = _manifest(tmp_path / name)
        assert manifest["job"]["runtime"] == manifest["runs"][0]["runtime"] == name
        assert (manifest["runs"][0]["compile_seconds"] > 0) is (name == "compiled")
    assert "compiled in" in result.output
    eager, compiled = _images(tmp_path / "eager"), _images(tmp_path / "compiled")
    assert eager.shape == compiled.shape and np.abs(eager.astype(int) - compiled).max() <= 1


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_sample_compile_without_a_compiler_is_one_line(tiny: Path, tmp_path: Path, no_compiler: None) -> None:
    result = _run(tiny, tmp_path / "out", "--compile")
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "needs a C++ compiler" in error and "apt install g++" in error and "--compile=try" in error
    assert not list((tmp_path / "out").glob("*"))


def test_sample_compile_try_without_a_compiler_samples_without(
    tiny: Path, plain: np.ndarray, tmp_path: Path, no_compiler: None
) -> None:
    result = _run(tiny, tmp_path / "out", "--compile=try", "--batch", "4")
    assert result.exit_code == 0, result.output
    (reason,) = [line for line in result.output.splitlines() if line.startswith("not compiled: ")]
    assert "needs a C++ compiler" in reason and "compiled in" not in result.output
    assert np.array_equal(_images(tmp_path / "out"), plain)
    (run,) = _manifest(tmp_path / "out")["runs"]
    assert run["runtime"] == "eager" and run["compile_seconds"] == 0


def test_sample_compile_try_compiles_where_it_can(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr("dgfast.runtimes.cpu.build.build", lambda function, example: built.append(example) or function)
    result = _run(tiny, tmp_path / "out", "--compile=try", "--batch", "3")
    assert result.exit_code == 0 and "compiled in" in result.output, result.output
    assert [tuple(x.shape) for x, _, _ in built] == [(3, 1, 8, 8)]  # the last batch of one image is filled up
    assert _manifest(tmp_path / "out")["runs"][0]["runtime"] == "compiled" and len(_images(tmp_path / "out")) == 4


def _spied_on(monkeypatch: pytest.MonkeyPatch, name: str, called: list[str]) -> None:
    """Let the launcher of this kernel run its reference, here on the CPU, and write down that it was called."""
    reference = getattr(ops, f"{name}_reference")

    def launch(*arguments: Any) -> Any:
        called.append(name)
        results = reference(*arguments)
        return results if isinstance(results, tuple) else (results, None) if name == "group_norm_silu" else results

    monkeypatch.setattr(f"dgfast.kernels.{name}.{name}", launch)


def test_sample_kernels_choose_the_implementation(
    tiny: Path, plain: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    called: list[str] = []
    monkeypatch.setattr("dgfast.kernels.launch.devices", lambda: ("cuda", "cpu"))
    for name in ("group_norm_silu", "guide", "churn", "euler_update", "heun_update"):
        _spied_on(monkeypatch, name, called)
    result = _run(tiny, tmp_path / "reference", "--kernels", "reference")
    assert result.exit_code == 0 and not called, result.output
    assert np.array_equal(_images(tmp_path / "reference"), plain)
    assert _manifest(tmp_path / "reference")["job"]["kernels"] == "reference"
    result = _run(tiny, tmp_path / "triton", "--kernels", "triton")
    assert result.exit_code == 0, result.output
    assert {"group_norm_silu", "euler_update", "heun_update"} <= set(called)
    assert np.array_equal(_images(tmp_path / "triton"), plain)
    assert _manifest(tmp_path / "triton")["job"]["kernels"] == "triton"


def test_sample_kernels_without_triton_are_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton" or ".kernels" in name]:
        if name.startswith(("triton", "dgfast.kernels")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    result = _run(tiny, tmp_path / "out", "--kernels", "triton")
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "Triton kernels cannot be imported" in error and "pip install 'dgfast[triton]'" in error
    assert not list((tmp_path / "out").glob("*"))


def test_sample_dg_every_saves_gradients_and_changes_little(tiny: Path, tmp_path: Path) -> None:
    job = ["--steps", "20", "--dg-window", "0,1.5"]
    guided = [*job, "--dg-weight", "50", "--dg-weight-2nd", "50"]
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
        result = _run(tiny, tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert f"39 score evaluations and {gradients[name]} guidance gradients" in result.output
        manifest = _manifest(tmp_path / name)
        assert manifest["runs"][0]["guidance_gradients"] == gradients[name]
        images[name] = _images(tmp_path / name).astype(int)
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
    result = _run(tiny, tmp_path / "out", "--batch", "4")
    assert result.exit_code == 0, result.output
    assert "out of memory: going on with batches of 2 images" in result.output
    assert np.abs(_images(tmp_path / "out").astype(int) - plain).max() <= 1
    assert _manifest(tmp_path / "out")["runs"][0]["images"] == 4


# Bad input ------------------------------------------------------------------------------------------------------------
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
        (["--boosting"], "boosting needs discriminator guidance"),
        (["--dg-every", "0"], "dg_every 0 must be a whole number, at least 1"),
        (["--dg-every", "1.5"], "'1.5' is not a valid integer"),
        (["--dg-reuse", "cubic"], "'cubic' is not one of 'hold', 'linear'"),
        (["--dg-weight", "1", "--dg-every", "2", "--boosting"], "boosting judges every call by its own log-ratio"),
        (["--compile=maybe"], "'maybe' is not one of 'always', 'try'"),
        (["--kernels", "cuda"], "'cuda' is not one of 'reference', 'triton'"),
        (["--diversity", "-1"], "diversity is at least 0"),
        (["--perceptual"], "perceptual needs diversity"),
        (["--target-class", "1", "--fidelity", "1"], "target_class needs diversity"),
        (["--base-class", "0", "--diversity", "1"], "base_class needs fidelity"),
        (["--diversity", "1", "--target-class", "3"], "target class 3 is out of range; the classifier knows classes 0"),
        (["--fidelity", "1", "--base-class", "-1"], "base_class -1 must be a whole number, at least 0"),
        (["--diversity", "1", "--classifier-scale", "1"], "weigh one and the same gradient"),
        (["--diversity", "1", "--normalize", "l1"], "'l1' is not one of"),
        (["--rho", "nan"], "not a finite number"),
        (["--rho", "-1"], "rho must be above 0"),
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
    result = _run(tiny, tmp_path / "out", *options)
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
    result = _run(score_only, tmp_path / "out", *options)
    assert result.exit_code == 2 and "bundle score-only has no" in result.output and role in result.output
    assert not (tmp_path / "out").exists()


def test_sample_used_out_is_refused_and_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = _run(tiny, tmp_path)
    assert result.exit_code == 2 and "already holds mine.txt" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_sample_nan_stops_and_names_step_and_sigma(tiny: Path, tmp_path: Path) -> None:
    result = _run(tiny, tmp_path / "out", "--dg-weight", "1e300")
    assert result.exit_code == 2 and "NaN or infinite at step" in result.output and "sigma" in result.output
    assert not list((tmp_path / "out").glob("*.npz"))


def test_sample_runs_as_a_module_and_help_is_quick_to_import() -> None:
    code = "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('dgfast.sample', run_name='__main__')\n"
    code += "except SystemExit as stop: assert stop.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dg-weight" in done.stdout
