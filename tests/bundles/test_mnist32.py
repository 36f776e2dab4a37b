"""The bundle that comes with dgfast: small, documented, and guided toward what looks real."""

from pathlib import Path

import pytest
import torch

import dgfast
from dgfast import bundle as bundles
from dgfast.nets.features import FeatureNet

_SEEDS = range(40)
_LABELS = [seed % 10 for seed in _SEEDS]


@pytest.fixture(scope="module")
def networks() -> dgfast.Networks:
    return dgfast.load("mnist32")


@pytest.fixture(scope="module")
def draws(networks: dgfast.Networks) -> dict[str, torch.Tensor]:
    """The same seeds and labels under each guidance."""
    configs = {
        "plain": dgfast.GuidanceConfig(),
        "discriminator": dgfast.GuidanceConfig(dg_weight=1.0),
        "classifier": dgfast.GuidanceConfig(classifier_scale=1.0),
        "classifier-free": dgfast.GuidanceConfig(cfg_scale=2.0),
    }
    fast = dgfast.SamplingConfig(12, "dpmpp-2m")  # a network call a step
    return {name: dgfast.Sampler(networks, fast, config)(_SEEDS, _LABELS) for name, config in configs.items()}


def test_mnist32_is_small_and_documented() -> None:
    bundle = bundles.read("mnist32")
    files = [path for path in bundle.folder.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "README.md", "bundle.json", *(spec.file for spec in bundle.nets.values())
    }  # fmt: skip
    assert sum(path.stat().st_size for path in files) < 8e6
    assert set(bundle.nets) == set(bundles.ROLES) and bundle.license and bundle.provenance
    assert len(bundle.class_names) == 10
    card = (bundle.folder / "README.md").read_text()
    for role in bundle.nets:
        assert bundle.metrics[role]["command"] in card


def test_mnist32_draws_digits_of_the_asked_class(draws: dict[str, torch.Tensor]) -> None:
    judge = bundles.read("mnist32").load("features")
    assert isinstance(judge, FeatureNet)
    with torch.no_grad():
        right = {
            name: float((judge(images).argmax(1) == torch.tensor(_LABELS)).float().mean())
            for name, images in draws.items()
        }
    assert all(share >= 0.8 for share in right.values()), right


def test_mnist32_each_guidance_raises_what_it_climbs(networks: dgfast.Networks, draws: dict[str, torch.Tensor]) -> None:
    """The judged noise level is one at which guidance acted; the same noise for both sides."""
    sigma = torch.full((len(_SEEDS),), 0.3, dtype=torch.float64)
    torch.manual_seed(0)
    noise = sigma.view(-1, 1, 1, 1) * torch.randn(draws["plain"].shape)
    rows = torch.nn.functional.one_hot(torch.tensor(_LABELS), 10).float()
    alpha = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
    assert networks.discriminator is not None and networks.classifier is not None

    def log_ratio(name: str) -> float:
        u = (alpha * (draws[name] + noise)).float()
        return float(networks.discriminator(u, networks.time(sigma), rows).mean())  # type: ignore[misc]

    def log_probability(name: str) -> float:
        u = (alpha * (draws[name] + noise)).float()
        logits = networks.classifier(u, networks.time(sigma))  # type: ignore[misc]
        return float((logits.log_softmax(-1) * rows).sum(-1).mean())

    with torch.no_grad():
        assert log_ratio("discriminator") > log_ratio("plain")
        assert log_probability("classifier") > log_probability("plain")


def test_mnist32_costs_what_the_paper_counts(networks: dgfast.Networks) -> None:
    sampler = dgfast.Sampler(networks, guidance=dgfast.GuidanceConfig(dg_weight=1.0))
    assert (sampler.score_evaluations, sampler.guidance_gradients) == (35, 15)


def test_mnist32_is_what_the_default_command_uses(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from dgfast.sample import main

    result = CliRunner().invoke(main, ["--seeds", "0-3", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "35 score evaluations and 15 guidance gradients an image" in result.output
    assert (tmp_path / "out" / "grid.png").stat().st_size > 500
