"""One forward an image: `--one-step` and `OneStep` keep what `Sampler` promises about seeds, labels and outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import dgfast
from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.errors import UserError
from dgfast.image_folder import read_images
from dgfast.networks import load
from dgfast.outputs import to_uint8
from dgfast.plan import Step
from dgfast.runtimes import Runtime
from dgfast.runtimes.cpu import build as cpu
from dgfast.sample import main

_SCORE = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_GENERATOR = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "latent_dim": 6, "channels": [16, 8]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a score network and a generator."""
    torch.manual_seed(0)
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "tiny", "tiny", {})
    for role, kind, keywords in (("score", "EDMPrecond", _SCORE), ("generator", "Generator", _GENERATOR)):
        bundle = bundles.with_net(bundle, role, nets.build(kind, **keywords), kind, keywords)
    bundles.write(bundle)
    return bundle.folder


def _run(bundle: Path, out: Path, *options: str, one_step: bool = True) -> Result:
    base = ["--bundle", str(bundle), "--seeds", "0-4", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *(["--one-step"] if one_step else []), *options])


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def test_one_step_writes_the_same_outputs(tiny: Path, tmp_path: Path) -> None:
    result = _run(tiny, tmp_path / "out", "--batch", "3", "--labels", "2,0")
    assert result.exit_code == 0, result.output
    assert "5 images in" in result.output and "one generator forward an image" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock", "grid.png", "images-00000.npz", "images-00001.npz", "manifest.json"
    ]  # fmt: skip
    images, labels = read_images(tmp_path / "out")
    assert images.shape == (5, 8, 8, 1) and labels.tolist() == [2, 0, 2, 0, 2]
    manifest = _manifest(tmp_path / "out")
    assert manifest["job"]["one_step"] is True and "guidance" not in manifest["job"]
    (run,) = manifest["runs"]
    assert manifest["job"]["seeds"] == "0-4" and run["images"] == 5 and run["seconds"] > 0
    assert run["score_evaluations"] == run["guidance_gradients"] == run["guided_calls"] == 0


def test_one_step_python_gives_what_the_door_writes(tiny: Path, tmp_path: Path) -> None:
    assert _run(tiny, tmp_path / "out", "--batch", "2").exit_code == 0
    images, labels = read_images(tmp_path / "out")
    sampler = dgfast.OneStep.load(tiny)
    drawn = sampler.draw_labels(range(5))
    assert drawn is not None and labels.tolist() == drawn.tolist() and len(set(labels)) > 1
    assert np.abs(to_uint8(sampler(range(5))).astype(int) - images).max() <= 1
    torch.testing.assert_close(sampler([3]), sampler(range(5))[3:4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sampler([3], [0]), sampler([3], [1]), atol=1e-3)
    assert not torch.allclose(sampler([3], [0]), sampler([4], [0]), atol=1e-3)


def test_one_step_is_one_forward_and_says_so(tiny: Path) -> None:
    calls: list[tuple[int, ...]] = []
    generator = bundles.read(tiny).load("generator")
    generator.register_forward_pre_hook(lambda module, arguments: calls.append(tuple(arguments[0].shape)))
    seen: list[tuple[Step, Tensor]] = []
    sampler = dgfast.OneStep(generator)  # type: ignore[arg-type]
    images = sampler(range(4), [0, 1, 2, 0], on_step=lambda step, x, *_: seen.append((step, x)))
    assert calls == [(4, 6)] and images.shape == (4, 1, 8, 8) and images.dtype == torch.float32
    assert [step for step, _ in seen] == list(sampler.steps) and seen[0][1] is images
    assert not images.requires_grad


def test_one_step_in_half_precision_stays_close(tiny: Path) -> None:
    images = dgfast.OneStep.load(tiny)(range(8))
    half = dgfast.OneStep.load(tiny, dtype=torch.bfloat16)(range(8))
    assert half.dtype == torch.float32 and 0 < float((half - images).abs().mean()) < 0.05


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
def test_one_step_in_another_runtime_draws_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    assert _run(tiny, tmp_path / "eager", "--batch", "3").exit_code == 0
    result = _run(tiny, tmp_path / runtime, "--batch", "3", "--runtime", runtime)
    assert result.exit_code == 0, result.output
    assert _manifest(tmp_path / runtime)["job"]["runtime"] == runtime
    eager, other = (read_images(tmp_path / name)[0] for name in ("eager", runtime))
    assert eager.shape == other.shape == (5, 8, 8, 1) and np.abs(eager.astype(int) - other).max() <= 1


def test_one_step_builds_each_runtime_once_a_shape(tiny: Path) -> None:
    built: list[tuple[int, ...]] = []

    def runtime(function: Any, example: Any) -> Any:
        built.append(tuple(example[0].shape))
        return lambda latents, rows: (2 * function(latents, rows)[0],)

    plain = dgfast.OneStep.load(tiny)(range(4))
    sampler = dgfast.OneStep.load(tiny, runtime=Runtime("twice", runtime, lambda _: runtime))
    sampler.prepare(4)
    assert built == [(4, 6)] * 2
    torch.testing.assert_close(sampler(range(4)), 4 * plain)  # built, and captured
    assert built == [(4, 6)] * 2
    sampler(range(3))
    assert built[2:] == [(3, 6)] * 2
    sampler.forget()
    sampler(range(3))
    assert built[4:] == [(3, 6)] * 2


def test_one_step_without_classes(tmp_path: Path) -> None:
    keywords = _GENERATOR | {"label_dim": 0}
    bundle = bundles.with_net(
        Bundle(tmp_path / "b", "b", {}), "generator", nets.build("Generator", **keywords), "Generator", keywords
    )
    bundles.write(bundle)
    result = _run(bundle.folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_images(tmp_path / "out")[1].tolist() == [-1] * 5
    with pytest.raises(UserError, match="unconditional"):
        dgfast.OneStep.load(bundle)([0], [1])


def test_networks_of_a_bundle_leave_its_generator_alone(tiny: Path, tmp_path: Path) -> None:
    """A sampler needs no generator: a broken one does not stop it, and --one-step needs no score network."""
    bundle = bundles.read(tiny)
    for role in ("score", "generator"):
        folder = tmp_path / role
        folder.mkdir()
        for path in tiny.iterdir():
            broken = path.name == f"{role}.safetensors"
            (folder / path.name).write_bytes(b"broken" if broken else path.read_bytes())
    assert load(tmp_path / "generator").denoiser.label_dim == bundle.spec("score").keywords["label_dim"]
    result = _run(tmp_path / "score", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(tmp_path / "score")


class _NotANumber(nn.Module):
    latent_dim, label_dim = 2, 0

    def forward(self, latents: Tensor, class_labels: Tensor | None) -> Tensor:
        return latents.new_full((len(latents), 1, 4, 4), torch.nan)


def test_one_step_refuses_images_that_are_not_numbers() -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        dgfast.OneStep(_NotANumber())([0])
    with pytest.raises(UserError, match="no seeds"):
        dgfast.OneStep(_NotANumber())([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "9", "--dg-weight", "1"], "leave out --steps, --dg-weight, or --one-step"),
        (["--solver", "euler"], "leave out --solver"),
        (["--boosting"], "leave out --boosting"),
        (["--s-churn", "0"], "leave out --s-churn"),
        (["--runtime", "onnx", "--engine", "nowhere.onnx"], "nowhere.onnx: no such file"),
        (["--labels", "3"], "label 3 is out of range; this network knows classes 0 to 2"),
    ],
    ids=["both", "solver", "flag", "churn", "engine", "label"],
)
def test_one_step_bad_input_is_one_line(tiny: Path, tmp_path: Path, options: list[str], message: str) -> None:
    _refused(_run(tiny, tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_one_step_needs_a_generator(tiny: Path, tmp_path: Path) -> None:
    bundle = bundles.read(tiny)
    folder = tmp_path / "score-only"
    alone = Bundle(folder, "score-only", {})
    bundles.write(bundles.with_net(alone, "score", bundle.load("score"), "EDMPrecond", _SCORE))
    _refused(_run(folder, tmp_path / "out"), "bundle score-only has no generator network; it has score")
    assert not (tmp_path / "out").exists()


def _refused(result: Result, message: str) -> None:
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output


def test_generator_traces_and_agrees_on_other_inputs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = bundles.read(tiny).load("generator")
    latents, rows = torch.randn(4, 6), torch.eye(3)[torch.arange(4) % 3]
    fast = cpu.build(lambda z, y: (generator(z, y),), (torch.zeros(4, 6), torch.zeros(4, 3)))
    torch.testing.assert_close(fast(latents, rows)[0], generator(latents, rows), atol=1e-5, rtol=1e-4)
