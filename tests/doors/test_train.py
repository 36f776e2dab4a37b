"""The door `python -m dgfast.train`: it learns, it can be interrupted, and it spoils nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from dgfast import bundle as bundles
from dgfast.errors import UserError
from dgfast.noise_levels import log_uniform_sigma, vp_time
from dgfast.train import main
from dgfast.training import job, loop
from dgfast.training.data import ImageSet, load_images, split
from dgfast.training.loop import Schedule, fit

_TINY_SCORE = '{"model_channels": 16, "channel_mult": [1], "attn_resolutions": []}'
_TINY_ENCODER = '{"channel_mult": [1, 1.5], "attention_resolutions": [], "num_head_channels": 8}'


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz data set: 8 x 8 images, left half bright for class 0, right half for class 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    images = rng.integers(0, 60, (120, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += 150
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, images=images, labels=labels)
    return path


def _train(command: str, bundle: Path, data: Path, *options: str) -> Result:
    shared = ["--bundle", str(bundle), "--data", str(data), "--holdout", "20", "--device", "cpu", "--batch", "8"]
    return CliRunner().invoke(main, [command, *shared, *options])


def test_train_makes_a_whole_bundle_that_samples(squares: Path, tmp_path: Path) -> None:
    from dgfast.sample import main as sample

    folder = tmp_path / "bundle"
    for command, options in (
        ("score", ["--images", "64", "--net", _TINY_SCORE, "--license", "CC0", "--provenance", "squares"]),
        ("features", ["--images", "64", "--net", '{"channels": 4}']),
        ("classifier", ["--images", "64", "--net", _TINY_ENCODER]),
    ):
        result = _train(command, folder, squares, *options)
        assert result.exit_code == 0, result.output
    draw = ["--bundle", str(folder), "--seeds", "0-19", "--steps", "3", "--device", "cpu"]
    result = CliRunner().invoke(sample, [*draw, "--out", str(tmp_path / "fakes")])
    assert result.exit_code == 0, result.output
    options = ["--images", "64", "--generated", str(tmp_path / "fakes"), "--dg-weight", "0.5"]
    head = ["--net", '{"model_channels": 16, "num_head_channels": 8, "attention_resolutions": []}']
    result = _train("discriminator", folder, squares, *options, *head)
    assert result.exit_code == 0, result.output

    done = bundles.read(folder)
    assert set(done.nets) == {"score", "features", "classifier", "discriminator"}
    assert done.class_names == ("0", "1") and done.license == "CC0" and done.provenance == "squares"
    assert done.guidance.dg_weight == 0.5 and done.spec("classifier").time_schedule == "linear"
    assert set(done.metrics["discriminator"]["held_out_by_sigma"]["1"]) == {"accuracy", "loss", "denoising"}
    assert done.metrics["score"]["command"].startswith(f"dgfast train score --bundle {folder} --data ")
    result = CliRunner().invoke(sample, [*draw, "--out", str(tmp_path / "guided")])
    assert (
        result.exit_code == 0
        and json.loads((tmp_path / "guided/manifest.json").read_text())["runs"][0]["guidance_gradients"]
    )


def test_train_keeps_what_joined_the_bundle_meanwhile(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_together = loop.fit_together

    def and_features_meanwhile(*arguments: Any) -> Any:
        monkeypatch.undo()
        assert _train("features", tmp_path / "bundle", squares, "--images", "8").exit_code == 0
        return fit_together(*arguments)

    monkeypatch.setattr(job, "fit_together", and_features_meanwhile)
    result = _train("score", tmp_path / "bundle", squares, "--images", "8", "--net", _TINY_SCORE)
    assert result.exit_code == 0, result.output
    done = bundles.read(tmp_path / "bundle")
    assert set(done.nets) == set(done.metrics) == {"score", "features"}


def _line(net: nn.Module, batch: int) -> Tensor:
    """Regression to y = 3 x + 1."""
    x = torch.randn(batch, 1)
    return ((net(x) - 3 * x - 1) ** 2).mean()


def _fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def test_training_learns_and_averages(tmp_path: Path) -> None:
    schedule = Schedule(images=8000, batch=16, lr=0.05, ema=0.9)
    net = fit(_fresh(), _line, schedule, tmp_path, torch.device("cpu"))
    assert abs(float(net.weight) - 3) < 0.01 and abs(float(net.bias) - 1) < 0.01  # type: ignore[arg-type]
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 1e-3 < losses[0]


def test_training_interrupted_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(images=4000, batch=16, lr=0.05)
    whole = fit(_fresh(), _line, schedule, tmp_path / "whole", torch.device("cpu"))
    calls = 0

    def interrupted(net: nn.Module, batch: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise KeyboardInterrupt
        return _line(net, batch)

    with pytest.raises(UserError, match="the same command goes on"):
        fit(_fresh(), interrupted, schedule, tmp_path / "parts", torch.device("cpu"))
    resumed = fit(_fresh(), _line, schedule, tmp_path / "parts", torch.device("cpu"))
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)  # type: ignore[arg-type]


def test_training_refuses_the_state_of_another_run(tmp_path: Path) -> None:
    fit(_fresh(), _line, Schedule(images=64, batch=16), tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match="another lr"):
        fit(_fresh(), _line, Schedule(images=64, batch=16, lr=1.0), tmp_path, torch.device("cpu"))


def test_training_stops_at_nan_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    schedule = Schedule(images=4000, batch=16, lr=0.05)
    calls = 0

    def diverging(net: nn.Module, batch: int) -> Tensor:
        nonlocal calls
        calls += 1
        return _line(net, batch) * (float("nan") if calls > 100 else 1.0)

    with pytest.raises(UserError, match="loss is nan at step 100"):
        fit(_fresh(), diverging, schedule, tmp_path, torch.device("cpu"))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] <= 100 and bool(state["net"]["0.weight"].isfinite().all())


def test_training_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(images=100_000, batch=100, warmup=0.1)
    factors = [schedule.factor(step) for step in range(schedule.steps + 1)]
    assert max(factors) == pytest.approx(1.0, abs=0.02) and np.argmax(factors) == pytest.approx(100, abs=5)
    assert factors[0] < 0.02 and factors[-1] == 0


def test_training_split_is_fixed_and_disjoint() -> None:
    data = ImageSet(np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1), np.arange(100))
    train, held_out = split(data, 30)
    assert sorted([*train.labels, *held_out.labels]) == list(range(100)) and len(held_out) == 30
    # The very images, for numbers of held-out ones are published, and a training goes on another day.
    assert held_out.labels.tolist()[:12] == [78, 2, 37, 92, 72, 63, 58, 8, 60, 13, 87, 80]
    assert np.array_equal(train.images.ravel(), train.labels)
    with pytest.raises(UserError, match="leaves nothing"):
        split(data, 100)


def test_training_digits_are_padded_and_all_there() -> None:
    data = load_images("mnist")
    assert data.images.shape == (5000, 32, 32, 1) and np.bincount(data.labels).tolist() == [500] * 10
    assert not data.images[:, :2].any() and data.images.max() == 255
    assert float(data.tensors()[0].min()) == -1 and float(data.tensors()[0].max()) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 8, 8), np.uint8)}, "no key labels"),
        ({"images": np.zeros((3, 8, 8), np.float32), "labels": np.zeros(3)}, "images must be uint8"),
        ({"images": np.zeros((3, 8, 8), np.uint8), "labels": np.zeros(4)}, "with labels [4]"),
    ],
    ids=["missing", "floats", "lengths"],
)
def test_training_bad_data_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError) as caught:
        load_images(str(tmp_path / "data.npz"))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("role", "shape", "labels", "message"),
    [
        ("score", (60, 8, 6), np.arange(60) % 2, "images of 8 x 6; what is trained here reads square ones"),
        ("score", (60, 8, 8), np.arange(60) % 2 - 1, "30 of 60 images have no label"),
        ("classifier", (60, 8, 8), np.full(60, -1), "a classifier network here needs one for each"),
        ("score", (60, 8, 8), np.zeros(60), "all pixels of all images are the same"),
        ("score", (1, 8, 8), np.zeros(1), "--holdout 20 leaves nothing of 1 images"),
    ],
    ids=["oblong", "some", "none", "constant", "single"],
)
def test_train_on_data_that_teach_nothing_is_one_line(
    tmp_path: Path, role: str, shape: tuple[int, ...], labels: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros(shape, np.uint8), labels=labels)
    result = _train(role, tmp_path / "bundle", tmp_path / "data.npz", "--images", "64")
    assert result.exit_code == 2 and message in result.output.splitlines()[-1], result.output
    assert not (tmp_path / "bundle").exists()


def test_train_does_not_go_on_with_data_that_changed(squares: Path, tmp_path: Path) -> None:
    """The file has the name that it had; only what it holds is another."""
    data, options = tmp_path / "data.npz", ["--images", "16", "--net", '{"channels": 2}']
    with np.load(squares) as file:
        images, labels = file["images"], file["labels"]
    np.savez(data, images=images, labels=labels)
    assert _train("features", tmp_path / "bundle", data, *options).exit_code == 0
    np.savez(data, images=255 - images, labels=labels)
    refused = _train("features", tmp_path / "bundle", data, *options)
    assert refused.exit_code == 2 and "a run with another content of --data; remove it" in refused.output


def test_train_names_classes_by_their_folders(tmp_path: Path) -> None:
    for index in range(40):
        place = tmp_path / "data" / ("cat" if index % 2 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 6 * index, np.uint8)).save(place / f"{index}.png")
    result = _train("score", tmp_path / "bundle", tmp_path / "data", "--images", "8", "--net", _TINY_SCORE)
    assert result.exit_code == 0 and bundles.read(tmp_path / "bundle").class_names == ("ant", "cat"), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "[1"], "not a JSON object"),
        (["--net", '{"no_such_keyword": 1}'], "no_such_keyword"),
        (["--data", "nowhere.npz"], "no such file"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--net", "[]"], "--net '[]' is not a JSON object"),
        (["--net", "[" * 9999], "is not a JSON object"),
        (["--net", '{"model_channels": -8}'], "--net: "),
        (["--net", '{"channel_mult": [1, 2, 2, 2, 2, 2]}'], "does not go through this network for images of 8 x 8 x 1"),
        (["--p-std", "0"], "--p-std 0 one above 0"),
        (["--images", "0"], "--images 0"),
    ],
    ids=["json", "keyword", "data", "device", "list", "deep", "negative", "levels", "spread", "images"],
)
def test_train_bad_input_is_one_line(squares: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = _train("score", tmp_path / "bundle", squares, "--images", "64", *options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and message in errors[0], result.output
    assert not (tmp_path / "bundle").exists()


def test_training_noise_is_log_uniform_as_dg_draws_it() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = log_uniform_sigma(u)
    assert torch.allclose(sigma.log().diff(), sigma.log().diff().mean().expand(100))
    # DG's own form: invert F(t) = ln(exp(B(t)) - 1), B(t) = 0.5 t^2 (beta_1 - beta_0) + beta_0 t.
    beta_0, beta_1 = 0.1, 20.0

    def antiderivative(t: float) -> Tensor:
        return torch.tensor(0.5 * t * t * (beta_1 - beta_0) + beta_0 * t, dtype=torch.float64).expm1().log()

    low, high = antiderivative(1e-5), antiderivative(1.0)
    B = (low + u * (high - low)).exp().log1p()
    t = (-beta_0 + (beta_0**2 + 2 * (beta_1 - beta_0) * B).sqrt()) / (beta_1 - beta_0)
    assert torch.allclose(vp_time(sigma), t, rtol=1e-9, atol=0)
