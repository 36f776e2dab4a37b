"""SiT and REPA: their checkpoints, and the guided velocity in the runtimes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from dgfast import bundle as bundles
from dgfast import convert
from dgfast.bundle import Bundle
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond, Velocity
from dgfast.graph.key import digest, written
from dgfast.guidance import ClassifierFreeGuidance, DiscriminatorGuidance, guided_velocity
from dgfast.guidance.skip_layer import SkipLayerGuidance
from dgfast.networks import Networks, load
from dgfast.runtimes import RUNTIMES
from dgfast.sampler import Sampler
from tests.support.export import export
from tests.support.sample import draw, images_of

SMALL = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
FlowNet = Callable[..., FlowPrecond]


# Checkpoints ----------------------------------------------------------------------------------------------------------
def converted(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(convert.main, [str(argument) for argument in (*arguments, "--role", "score")])
    return result.exit_code, result.output


@pytest.fixture
def raw(filled_net: Callable[..., Any]) -> Any:
    return filled_net("DiT", SMALL, "sit/")


@pytest.fixture
def raw_of_repa(filled_net: Callable[..., Any]) -> Any:
    return filled_net("DiT", {**SMALL, "learn_sigma": False}, "repa/")


def repa_state(raw: nn.Module, legacy: bool = False) -> dict[str, Tensor]:
    """The tensors of a training of REPA; at first it counted the blocks above the projectors anew."""
    state = raw.state_dict() | {"projectors.0.0.weight": torch.ones(3, 32), "projectors.0.0.bias": torch.ones(3)}
    return {name.replace("blocks.1.", "decoder_blocks.0.") if legacy else name: x for name, x in state.items()}


@pytest.mark.parametrize("options", [["--set", "model_type=SiT"], ["--kind", "FlowPrecond"]])
def test_sit_checkpoint_that_is_told_to_be_one_becomes_a_bundle(tmp_path: Path, raw: Any, options: list[str]) -> None:
    torch.save(raw.state_dict(), tmp_path / "sit.pt")
    told = ["--set", "num_heads=2", "--vae", "some/vae", *options]
    code, output = converted(tmp_path / "sit.pt", "--out", tmp_path / "b", *told)
    assert code == 0 and all(f"--set {name}=" in output for name in ("path", "prediction", "toward_noise"))
    bundle = bundles.read(tmp_path / "b")
    assert bundle.vae is not None and bundle.vae.scale == 0.18215
    assert (bundle.sampling, bundle.guidance) == (
        SamplingConfig(solver="flow-sde", num_steps=250), GuidanceConfig(cfg_channels=3)
    )  # fmt: skip
    score: Any = load(bundle).denoiser
    assert (score.path.name, score.prediction, score.label_dim, score.null_class) == ("linear", "velocity", 5, 5)
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.75], dtype=torch.float64), torch.tensor([5, 1])
    labels = torch.tensor([[0.0] * 5, [0, 1, 0, 0, 0]])
    velocity = score.velocity(x, (1 - t) / t, labels)
    torch.testing.assert_close(velocity, raw(x, t, y)[:, :4], atol=1e-5, rtol=0)
    torch.testing.assert_close(score.velocity(x, (1 - t) / t)[0], velocity[0])  # no labels: the null class


def test_sit_names_without_a_word_are_taken_for_a_dit_and_that_is_said(tmp_path: Path, raw: Any) -> None:
    torch.save(raw.state_dict(), tmp_path / "either.pt")
    code, output = converted(tmp_path / "either.pt", "--out", tmp_path / "b", "--set", "num_heads=2")
    assert code == 0 and "DDPMPrecond" in output
    (row,) = (line.split("  ") for line in output.splitlines() if line.strip().startswith("model_type  "))
    assert "DiT" in row[-3:][0] or "--set model_type=SiT" in row[-1]


@pytest.mark.parametrize("legacy", [False, True])
def test_repa_checkpoint_says_itself_what_it_is(tmp_path: Path, raw_of_repa: Any, legacy: bool) -> None:
    """Its time runs from data to noise, and its velocity too: v(x, t) = -R(x, 1 - t)."""
    torch.save({"ema": repa_state(raw_of_repa, legacy), "steps": 7}, tmp_path / "repa.pt")
    code, output = converted(tmp_path / "repa.pt", "--out", tmp_path / "b", "--set", "num_heads=2")
    assert code == 0 and "without the projectors of its training" in output and "--set toward_noise=false" in output
    bundle = bundles.read(tmp_path / "b")
    assert bundle.sampling.solver == "flow-sde" and bundle.guidance == GuidanceConfig()  # it guides all channels
    score: Any = load(bundle).denoiser
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([2, 0])
    wanted = -raw_of_repa(x, 1 - t, y)
    torch.testing.assert_close(score.velocity(x, (1 - t) / t, torch.eye(5)[y]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "path=cosine"], "path 'cosine' is not one of linear, gvp, vp"),
        (["--set", "prediction=x"], "prediction 'x' is not one of velocity, noise, score"),
        (["--set", "path=1"], "path 1"),
        (["--kind", "DDPMPrecond", "--set", "steps=10"], "steps"),
    ],
)
def test_sit_with_keywords_that_cannot_be_is_refused(tmp_path: Path, raw: Any, options: list[str], said: str) -> None:
    torch.save(raw.state_dict(), tmp_path / "sit.pt")
    told = ["--set", "num_heads=2", "--set", "model_type=SiT", *options]
    code, output = converted(tmp_path / "sit.pt", "--out", tmp_path / "b", *told)
    assert code == 2 and said in output and not (tmp_path / "b").exists()


def test_repa_with_normalised_queries_is_refused_by_their_name(tmp_path: Path, raw_of_repa: Any) -> None:
    torch.save(repa_state(raw_of_repa) | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, tmp_path / "repa.pt")
    code, output = converted(tmp_path / "repa.pt", "--out", tmp_path / "b", "--set", "num_heads=2")
    assert code == 2 and "blocks.0.attn.q_norm.weight" in output and not (tmp_path / "b").exists()


# Runtimes -------------------------------------------------------------------------------------------------------------
LEVELS = torch.tensor([torch.inf, 20.0, 1.0, 0.0], dtype=torch.float64)


def states(seed: int) -> Tensor:
    return torch.randn(len(LEVELS), 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Critic(nn.Module):
    """A discriminator of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.look = nn.Conv2d(1, 4, 3, padding=1).requires_grad_(False)

    def forward(self, u: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return (nn.functional.silu(self.look(u)) * (1 + t.float()).view(-1, 1, 1, 1)).mean((1, 2, 3))


@pytest.mark.parametrize("runtime", ["compiled", "onnx"])
@torch.no_grad()
def test_guided_velocity_is_the_same_in_every_runtime(runtime: str, tiny_sit: FlowNet) -> None:
    """Two velocities mixed and a discriminator's gradient, from infinite noise to none."""
    net, labels = tiny_sit(3), torch.eye(3)[[0, 1, 2, 0]]
    guidances = [ClassifierFreeGuidance(Velocity(net), 2.5), DiscriminatorGuidance(Critic(), 30.0, (0.2, 0.9))]
    function = guided_velocity(net, guidances)
    built = RUNTIMES[runtime].build(function, (states(0), LEVELS.roll(1), labels))
    for seed, sigma in enumerate((LEVELS, LEVELS.roll(2))):
        results = built(states(seed + 1), sigma, labels), function(states(seed + 1), sigma, labels)
        for mine, reference in zip(*results, strict=True):
            size = reference.abs().flatten(1).amax(1) if reference.dim() > 1 else reference.abs()
            error = (mine - reference).abs().view(len(LEVELS), -1).amax(1)
            assert (error <= 2e-5 * size.clip(min=1)).all(), (runtime, error)
    change = built(states(1), LEVELS, labels)[0] - guided_velocity(net, guidances[:1])(states(1), LEVELS, labels)[0]
    moved = change.abs().amax((1, 2, 3))
    assert (moved[[0, 3]] < 1e-4).all() and (moved[[1, 2]] > 1e-3).all()  # the gradient acts inside alone


@pytest.fixture(scope="module")
def sit_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_sit: FlowNet) -> Path:
    """A bundle of a tiny network of flow matching, which its authors would draw from with noise."""
    keywords = {
        "model_type": "SiT", "img_resolution": 8, "img_channels": 1, "label_dim": 3, "patch_size": 4,
        "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False,
    }  # fmt: skip
    bundle = Bundle(tmp_path_factory.mktemp("bundles") / "sit", "sit", {}, SamplingConfig(solver="flow-sde"))
    bundles.write(bundles.with_net(bundle, "score", tiny_sit(3), "FlowPrecond", keywords))
    return bundle.folder


@pytest.fixture(scope="module")
def by_default(sit_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    out = tmp_path_factory.mktemp("sit") / "out"
    assert draw(sit_bundle, out).exit_code == 0
    return images_of(out)


@pytest.mark.parametrize(
    "options",
    [
        ["--solver", "flow-euler"], ["--solver", "flow-heun"], ["--solver", "flow-sde-heun"], ["--solver", "heun"],
        ["--diffusion", "linear", "--diffusion-norm", "2"], ["--diffusion", "decreasing"], ["--diffusion-norm", "0.5"],
        ["--last-step", "euler"], ["--last-step", "tweedie"], ["--last-step", "none"], ["--last-size", "0.2"],
        ["--cfg-scale", "4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_sample_every_option_of_a_flow_changes_the_images(
    sit_bundle: Path, by_default: np.ndarray, tmp_path: Path, options: list[str]
) -> None:
    result = draw(sit_bundle, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert not np.array_equal(images_of(tmp_path / "out"), by_default)


def test_sample_says_which_solvers_a_network_of_flow_matching_takes(sit_bundle: Path, tmp_path: Path) -> None:
    result = draw(sit_bundle, tmp_path / "out", "--solver", "ddpm")
    assert result.exit_code == 2 and "ddpm draws in discrete time" in result.output and "flow-heun" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(("solver", "what"), [("flow-sde", "velocity"), ("flow-heun", "step")])
def test_exported_files_of_a_flow_are_proved_and_draw_the_same(
    sit_bundle: Path, by_default: np.ndarray, tmp_path: Path, solver: str, what: str
) -> None:
    options = ["--solver", solver, "--what", what, "--cfg-scale", "2"]
    done = export("--bundle", str(sit_bundle), *options, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("*.onnx")
    if what == "velocity":
        by_file = ["--runtime", "onnx", "--engine", str(file)]
        assert draw(sit_bundle, tmp_path / "file", "--cfg-scale", "2", *by_file).exit_code == 0
        assert draw(sit_bundle, tmp_path / "eager", "--cfg-scale", "2").exit_code == 0
        mine, eager = (images_of(tmp_path / name).astype(int) for name in ("file", "eager"))
        assert abs(mine - eager).max() <= 1 and abs(eager - by_default.astype(int)).max() > 1
    wrong = export("--bundle", str(sit_bundle), "--what", "denoiser", "--out", str(tmp_path / "no"))
    assert wrong.exit_code == 2 and "flow-sde calls a velocity; export that, or a step" in wrong.output


def test_a_network_of_flow_matching_draws_with_the_solvers_in_sigma(tiny_sit: FlowNet) -> None:
    """They end in the same images, the finer the nearer, as far as they begin at the same noise."""
    networks, latents, labels = Networks(tiny_sit(3)), states(3)[:2], torch.eye(3)[:2]
    along = Sampler(networks, SamplingConfig(solver="flow-heun", num_steps=100)).integrate(latents, labels)
    for solver in ("heun", "euler", "dpmpp-2m"):
        config = SamplingConfig(solver=solver, num_steps=100, sigma_max=1e4, sigma_min=1e-3)
        images = Sampler(networks, config).integrate(latents, labels)
        share = 0.04 if solver == "euler" else 0.01
        assert (images - along).abs().max() < share * along.abs().max(), solver


@torch.no_grad()
def test_a_perturbed_self_guides_velocities_from_end_to_end(tiny_sit: FlowNet) -> None:
    """v' = v + p (v - v_per), at infinite noise and at none too."""
    net, labels = tiny_sit(3, depth=2), torch.eye(3)[[0, 1, 2, 0]]
    config, guidance = SamplingConfig(solver="flow-heun", num_steps=3), GuidanceConfig(slg_scale=2.0)
    sampler = Sampler(Networks(net), config, guidance)
    assert sampler.score_evaluations == 12 and sampler.integrate(states(1), labels).isfinite().all()
    (skipping,) = sampler.steps[0].predictor
    assert isinstance(skipping, SkipLayerGuidance) and isinstance(skipping.reference, Velocity)
    plain, worse = (one.velocity(states(2), LEVELS, labels).double() for one in (net, skipping.reference.net))
    guided, _ = guided_velocity(net, [skipping])(states(2), LEVELS, labels)
    torch.testing.assert_close(guided, plain + 2 * (plain - worse), rtol=1e-6, atol=1e-6)
    assert ((plain - worse).abs().amax((1, 2, 3)) > 1e-3).all()


def test_graphs_of_a_guided_velocity_can_be_kept(tiny_sit: FlowNet) -> None:
    """By a name that says all that they depend on: the path too."""
    names = set()
    for path in ("linear", "gvp"):
        net = tiny_sit(3, path=path)
        names.add(digest(*written(guided_velocity(net, [ClassifierFreeGuidance(Velocity(net), 2.0)]))))
    assert len(names) == 2
