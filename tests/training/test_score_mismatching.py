"""Score Mismatching: its losses in closed form, what its players tend to on Gaussians, and its door."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.errors import UserError
from dgfast.train import main
from dgfast.training.loop import Player, Schedule, fit_together
from dgfast.training.score_mismatching import Game, noise_levels

CPU = torch.device("cpu")
MEAN, STD = 0.4, 0.2  # of the real Gaussian


class Line(nn.Module):
    """A score network of scalars: (x [B, 1, 1, 1], level [B]) -> predicted noise."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = noise_levels().float()[level]
        return self.layers(torch.stack([2 * x.flatten(), 6 * sigma - 1], dim=1)).view_as(x)


class TwoHeaps(nn.Module):
    """Generated scalars: half near the real ones, half far from all of them."""

    latent_dim, label_dim = 2, 0
    near, far, std = -0.2, -2.5, 0.25

    def forward(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        centre = torch.where(latents[:, 1] > 0, self.near, self.far)
        return (centre + self.std * latents[:, 0]).view(-1, 1, 1, 1)


class Scalar(nn.Module):
    """A generator of one Gaussian, whose mean and log standard deviation it learns."""

    latent_dim, label_dim = 1, 0

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(-0.4)), nn.Parameter(torch.tensor(math.log(0.4)))

    def forward(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return (self.mean + self.log_std.exp() * latents).view(-1, 1, 1, 1)


def real_scalars() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return MEAN + STD * torch.randn(20_000, 1, 1, 1), torch.zeros(20_000, dtype=torch.int64)


def normal_density(x: Tensor, mean: float, std: Tensor) -> Tensor:
    return (-((x - mean) ** 2) / (2 * std**2)).exp() / std


def conditional_noise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[e | x_t = x] of the real Gaussian."""
    return sigma * (x - MEAN) / (STD**2 + sigma**2)


def test_score_mismatching_noise_levels_are_the_published_ones() -> None:
    published = [0.0100, 0.0491, 0.0832, 0.1167, 0.1498, 0.1826, 0.2151, 0.2472, 0.2790, 0.3103]
    assert noise_levels().tolist() == pytest.approx(published, abs=5e-5)
    assert float(noise_levels(20)[-1]) == pytest.approx(0.428, abs=5e-4)


def test_score_network_tends_to_score_times_probability_of_real(tmp_path: Path) -> None:
    torch.manual_seed(0)
    score, generator = Line(), TwoHeaps()
    game = Game(real_scalars(), generator, score, CPU)
    schedule = Schedule(images=450 * 1024, batch=1024, lr=2e-2, ema=0.98)
    (trained,) = fit_together([Player(score, game.score_loss)], schedule, tmp_path, CPU)

    errors, without_probability, on_fakes = [], [], []
    for level in (4, 7, 9):
        sigma = noise_levels().float()[level]
        x = torch.linspace(MEAN - 4 * STD, MEAN + 2 * STD, 41)
        spread = (TwoHeaps.std**2 + sigma**2).sqrt()
        real = normal_density(x, MEAN, (STD**2 + sigma**2).sqrt())
        fake = 0.5 * normal_density(x, TwoHeaps.near, spread) + 0.5 * normal_density(x, TwoHeaps.far, spread)
        target = real / (real + fake) * conditional_noise(x, sigma)
        far = torch.linspace(TwoHeaps.far - 0.5, TwoHeaps.far + 0.5, 41)
        with torch.no_grad():
            found, found_far = (trained(at.view(-1, 1, 1, 1), torch.full((41,), level)).flatten() for at in (x, far))
        errors.append((found - target).square().mean())
        without_probability.append((found - conditional_noise(x, sigma)).square().mean())
        on_fakes.append(found_far.square().mean())
    error, plain, fakes = (
        float(torch.stack(squares).mean().sqrt()) for squares in (errors, without_probability, on_fakes)
    )
    assert error < 0.06 and fakes < 0.04, (error, fakes)
    assert plain > 0.2  # the score alone, without the probability, would not pass


def test_generator_follows_the_score_networks_gradient_to_the_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    score, generator = Line(), Scalar()
    game = Game(real_scalars(), generator, score, CPU)
    averaged = fit_together(game.players(0.01), Schedule(700 * 128, 128, lr=2e-2, ema=0.98), tmp_path, CPU)[1]
    assert float(averaged.mean) == pytest.approx(MEAN, abs=0.2)  # type: ignore[arg-type]  # from -0.4


class Linear(nn.Module):
    """S(x) = gain x."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.gain * x


class Constant(nn.Module):
    """Images of one grey, three pixels each."""

    latent_dim, label_dim = 2, 0

    def __init__(self, grey: float) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.tensor(grey))

    def forward(self, latents: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.grey.expand(len(latents), 1, 1, 3)


@pytest.mark.parametrize("gain", [0.0, 1.5])
def test_score_mismatching_losses_in_closed_form(gain: float) -> None:
    """S = a x on pixels c: a match costs a^2 c^2 + (a sigma - 1)^2 each, a mismatch a^2 (c^2 + sigma^2) + 1."""
    real, fake = 0.5, -0.8
    images = torch.full((50, 1, 1, 3), real), torch.zeros(50, dtype=torch.int64)
    score, generator = Linear(gain), Constant(fake)
    game = Game(images, generator, score, CPU)
    sigma = noise_levels()

    def match(grey: float) -> float:
        return 3 * float((gain**2 * grey**2 + (gain * sigma - 1) ** 2).mean())

    mismatch = 3 * float((gain**2 * (fake**2 + sigma**2) + 1).mean())
    torch.manual_seed(0)
    with torch.no_grad():
        assert float(game.score_loss(score, 40_000)) == pytest.approx(match(real) + mismatch, rel=0.02)
        assert float(game.generator_loss(generator, 40_000)) == pytest.approx(match(fake), rel=0.02)
    assert float(game.penalty(score, 16).detach()) == pytest.approx(3 * gain**2 / 2)


class Recorder(nn.Module):
    """A score network that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, level: Tensor, class_labels: Tensor) -> Tensor:
        self.seen.append((x, class_labels.argmax(1)))
        return x


class Grey(nn.Module):
    """Class k of three is the grey k - 5."""

    latent_dim, label_dim = 1, 3

    def forward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        return (class_labels.argmax(1) - 5.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_score_mismatching_shows_images_with_their_class_in_groups_of_one() -> None:
    labels = torch.arange(300) % 3
    real = (labels + 5.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    score = Recorder()
    Game((real, labels), Grey(), score, CPU).score_loss(score, 40)
    for (x, classes), offset in zip(score.seen, (5, -5), strict=True):
        assert torch.equal(classes.view(-1, 4), classes[::4, None].expand(-1, 4)) and len(classes.unique()) == 3
        assert torch.equal((x.mean((1, 2, 3)) - offset).round(), classes.float())


def test_score_mismatching_takes_images_without_labels_for_one_class() -> None:
    images, labels = real_scalars()
    games = [Game((images, classes), Scalar(), Line(4), CPU) for classes in (0 * labels, 0 * labels - 1)]
    losses = []
    for game in games:
        torch.manual_seed(0)
        losses.append(float(game.score_loss(Line(4), 8).detach()))
    assert losses[0] == losses[1]


def test_score_mismatching_penalty_comes_every_sixteenth_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game = Game(real_scalars(), Scalar(), Line(4), CPU)
    calls: list[int] = []
    steps = 0
    penalty, loss = game.penalty, game.score_loss

    def counted(score: nn.Module, batch: int) -> Tensor:
        nonlocal steps
        steps += 1
        return loss(score, batch)

    def recorded(score: nn.Module, batch: int) -> Tensor:
        calls.append(steps - 1)
        return penalty(score, batch)

    monkeypatch.setattr(game, "score_loss", counted)
    monkeypatch.setattr(game, "penalty", recorded)
    fit_together(game.players(0.01), Schedule(images=40 * 8, batch=8), tmp_path, CPU)
    assert calls == [0, 16, 32]


# Two players in one loop ----------------------------------------------------------------------------------------------
def chase(other: nn.Module) -> Callable[[nn.Module, int], Tensor]:
    """A loss that pulls one network's weight to the other's, and gradients through both."""

    def loss(net: nn.Module, batch: int) -> Tensor:
        x = torch.randn(batch, 1)
        return (net(x) - other(x) - 0.1).square().mean()

    return loss


def pair() -> list[Player]:
    torch.manual_seed(3)
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    return [Player(first, chase(second)), Player(second, chase(first), (0.0, 0.99), rate=0.5)]


def weights(networks: list[nn.Module]) -> list[Tensor]:
    return [value for net in networks for value in net.state_dict().values()]


def test_training_moves_each_player_by_its_own_loss_alone(tmp_path: Path) -> None:
    players = pair()
    still = [value.clone() for value in weights([players[0].net])]

    def frozen(net: nn.Module, batch: int) -> Tensor:  # its own loss has no gradient
        return 0 * torch.stack([parameter.sum() for parameter in net.parameters()]).sum()

    second = weights([players[1].net])[0].clone()
    fit_together([Player(players[0].net, frozen), players[1]], Schedule(20 * 8, 8, lr=0.01), tmp_path, CPU)
    assert all(torch.equal(a, b) for a, b in zip(still, weights([players[0].net]), strict=True))
    assert not torch.equal(second, weights([players[1].net])[0])


def test_training_two_players_go_on_exactly_after_an_interruption(tmp_path: Path) -> None:
    schedule = Schedule(images=60 * 8, batch=8, lr=0.01)
    whole = fit_together(pair(), schedule, tmp_path / "whole", CPU)
    parts, seen = pair(), 0

    def interrupt(networks: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 30:
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="the same command goes on"):
        fit_together(parts, schedule, tmp_path / "parts", CPU, watch=interrupt)
    resumed = fit_together(pair(), schedule, tmp_path / "parts", CPU)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_training_names_the_step_at_which_either_player_diverged(tmp_path: Path) -> None:
    players = pair()
    calls = 0

    def diverging(net: nn.Module, batch: int) -> Tensor:
        nonlocal calls
        calls += 1
        return players[1].loss(net, batch) * (float("nan") if calls > 201 else 1.0)

    schedule = Schedule(images=400 * 8, batch=8, lr=0.01)  # looks every 2 steps
    with pytest.raises(UserError, match="loss is nan at step 201"):
        fit_together([players[0], Player(players[1].net, diverging)], schedule, tmp_path, CPU)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 200 and all(bool(value.isfinite().all()) for value in state["net"].values())


def test_training_keeps_no_state_whose_weights_are_not_finite(tmp_path: Path) -> None:
    net, calls = nn.Linear(1, 1), 0

    def steep(net: nn.Module, batch: int) -> Tensor:  # finite itself, with an infinite gradient in the fifth step
        nonlocal calls
        calls += 1
        weight = net.get_parameter("weight").sum()
        return (weight - weight.detach()).sqrt() if calls == 5 else weight.square()

    with pytest.raises(UserError, match="a weight is NaN or infinite after step 4"):
        fit_together([Player(net, steep)], Schedule(images=100, batch=1), tmp_path, CPU)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


# The door -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=rng.integers(0, 255, (60, 8, 8)).astype(np.uint8), labels=np.arange(60) % 3)
    return path


_TINY = ["--net", '{"channels": [8, 8], "latent_dim": 5, "style_dim": 8}', "--score-net", '{"channels": [8]}']


def _train(folder: Path, data: Path, *options: str) -> str:
    shared = ["--bundle", str(folder), "--data", str(data), "--holdout", "20", "--device", "cpu", "--batch", "4"]
    result = CliRunner().invoke(main, ["generator", *shared, *options])
    return result.output if result.exit_code == 0 else f"exit code {result.exit_code}: {result.output}"


def test_train_generator_joins_the_bundle(data: Path, tmp_path: Path) -> None:
    output = _train(tmp_path / "bundle", data, "--images", "24", *_TINY)
    assert output.startswith("exit code") is False, output
    done = bundles.read(tmp_path / "bundle")
    generator = done.load("generator")
    images = generator(torch.randn(3, 5), torch.eye(3))
    assert images.shape == (3, 1, 8, 8) and float(images.abs().max()) <= 1
    record = done.metrics["generator"]
    assert "dgfast train" in record["command"]
    assert record["parameters"] == sum(parameter.numel() for parameter in generator.parameters())
    training = tmp_path / "bundle" / "training" / "generator"
    with Image.open(training / "samples.png") as sheet:
        assert sheet.size == (80, 80)
    lines = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]) == {"step", "loss_0", "loss_1", "seconds"} and lines[-1]["step"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", '{"channels": [8, 8, 8, 8]}'], "--net: 8 pixels cannot be halved 4 times"),
        (["--score-net", '{"channels": [8, 8, 8, 8]}'], "--score-net: 8 pixels cannot be halved"),
        (["--score-net", '{"no_such_keyword": 1}'], "--score-net: NoisePredictor: "),
        (["--score-net", "[1"], "--score-net '[1' is not a JSON object"),
    ],
    ids=["size", "score-size", "keyword", "json"],
)
def test_train_generator_bad_input_is_one_line(data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    output = _train(tmp_path / "bundle", data, "--images", "24", *options)
    errors = [line for line in output.splitlines() if "Error: " in line]
    assert output.startswith("exit code 2") and len(errors) == 1 and message in errors[0], output
    assert not (tmp_path / "bundle").exists()


# The networks ---------------------------------------------------------------------------------------------------------
def test_generator_images_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    net = nets.build("Generator", img_resolution=16, img_channels=2, label_dim=3, channels=[16, 8]).eval()
    latents, rows = torch.randn(6, 64), torch.eye(3).repeat(2, 1)
    together = net(latents, rows)
    assert together.shape == (6, 2, 16, 16)
    torch.testing.assert_close(net(latents[2:3], rows[2:3]), together[2:3], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(together, net(latents, rows.roll(1, 0)), atol=1e-3)  # the class matters


def test_noise_predictor_starts_flat_and_reads_level_and_class() -> None:
    torch.manual_seed(0)
    net = nets.build("NoisePredictor", img_resolution=8, img_channels=1, label_dim=3, channels=[8, 16])
    x, level, rows = torch.randn(4, 1, 8, 8), torch.arange(4), torch.eye(3)[torch.arange(4) % 3]
    assert float(net(x, level, rows).detach().std((0, 2, 3)).max()) < 1e-6
    nn.init.normal_(net.get_parameter("out.weight"))
    noise = net(x, level, rows)
    assert noise.shape == x.shape
    assert not torch.allclose(noise, net(x, level + 1, rows)) and not torch.allclose(noise, net(x, level, None))


def test_noise_predictor_compares_the_images_of_a_group() -> None:
    torch.manual_seed(0)
    shape = {"img_resolution": 8, "img_channels": 1, "channels": [8, 16], "minibatch_std": True}
    net = nets.build("NoisePredictor", **shape).requires_grad_(False)
    nn.init.normal_(net.get_parameter("out.weight"))
    x, level = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
    noise = net(x, level)
    x[3] = x[0]  # one of the first group
    changed = net(x, level)
    torch.testing.assert_close(changed[4:], noise[4:])
    assert not torch.allclose(changed[:3], noise[:3], atol=1e-4)
