"""Trajectories: recording changes nothing, and the correction is what guidance adds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgfast
from dgfast import bundle as bundles
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.outputs import to_uint8
from dgfast.ranges import Ranges
from dgfast.reporting import trajectory
from dgfast.reporting.trajectory import Trajectory, record

_STEPS = SamplingConfig(num_steps=4, sigma_max=5.0)


def _recorded(guidance: GuidanceConfig, sampling: SamplingConfig = _STEPS, seeds: str = "3-4") -> Trajectory:
    return record(bundles.read("mnist32"), sampling, guidance, Ranges.parse(seeds), Ranges.parse("7"))


@pytest.fixture(scope="module")
def guided() -> Trajectory:
    return _recorded(GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0))


def test_runs_are_those_of_the_sampler(guided: Trajectory) -> None:
    networks = dgfast.load("mnist32")
    both = GuidanceConfig(dg_weight=1.0, dg_weight_2nd=1.0)
    for guidance, seen in ((both, guided.guided), (GuidanceConfig(), guided.unguided)):
        predicted = list[np.ndarray]()
        sampler = dgfast.Sampler(networks, _STEPS, guidance)
        images = sampler([3, 4], [7, 7], on_step=lambda step, x, denoised, _: predicted.append(to_uint8(denoised)))  # noqa: B023
        assert np.array_equal(seen, np.stack([*predicted, to_uint8(images)]))
        assert guided.sigmas.tolist() == [step.sigma for step in sampler.steps]
    assert guided.seeds.tolist() == [3, 4] and guided.labels.tolist() == [7, 7]


def test_correction_is_the_discriminators_by_its_formula(guided: Trajectory) -> None:
    """w sigma^2 grad log d / (1 - d) at the first state, which both runs share; so it is linear in w."""
    networks = dgfast.load("mnist32")
    sampler = dgfast.Sampler(networks, _STEPS, GuidanceConfig(dg_weight=1.0))
    streams = sampler._streams([3, 4])
    x = sampler.first_state(streams.normal(sampler.shape, torch.float32, torch.device("cpu")))
    sigma, labels = torch.full((2,), sampler.steps[0].sigma, dtype=x.dtype), sampler.class_labels([7, 7], 2)
    denoised = sampler.job.guided("denoiser", ())(x, sigma, labels)[0]
    (guidance,) = sampler.steps[0].predictor
    direction, gate, log_ratio = guidance.correct(x, sigma, labels, denoised)
    added = (gate.view(-1, 1, 1, 1) * direction).double().flatten(1).square().mean(1).sqrt()
    assert log_ratio is not None
    np.testing.assert_allclose(guided.corrections[0], added.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(guided.log_ratios[0], log_ratio.detach().numpy(), rtol=1e-4)
    twice = _recorded(GuidanceConfig(dg_weight=2.0))
    np.testing.assert_allclose(twice.corrections[0], 2 * guided.corrections[0], rtol=1e-4)


def test_carried_gradients_count_as_corrections() -> None:
    reused = _recorded(GuidanceConfig(dg_weight=1.0, dg_every=2), replace(_STEPS, solver="euler", sigma_min=1.0))
    assert (reused.corrections > 0).all() and np.isnan(reused.log_ratios[1]).all()


def test_outside_of_the_interval_nothing_is_corrected_and_nobody_asked() -> None:
    free = _recorded(GuidanceConfig(cfg_scale=2.0, guidance_interval=(0.5, 100.0)))
    inside = free.sigmas > 0.5
    assert (free.corrections[inside] > 0).all() and not free.corrections[~inside].any()
    assert np.isnan(free.log_ratios).all() and inside.any() and not inside.all()


def test_distance_is_the_root_mean_square_of_the_pictures(guided: Trajectory) -> None:
    apart = replace(guided, guided=np.full_like(guided.guided, 200), unguided=np.full_like(guided.guided, 73))
    np.testing.assert_allclose(apart.distances, 127 / 127.5)


def test_file_holds_all_of_it(guided: Trajectory, tmp_path: Path) -> None:
    trajectory.save(guided, tmp_path / "t.npz")
    again = trajectory.read(tmp_path / "t.npz")
    for name in ("sigmas", "guided", "unguided", "corrections", "log_ratios", "seeds", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(guided, name))
    assert again.about["bundle"] == "mnist32" and again.about["guidance"]["dg_weight"] == 1.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"about": np.array("{")}, "no trajectory"),
        ({"about": np.array(json.dumps({"format": "other"}))}, "its format is not"),
        ({"guided": np.zeros((5, 2, 32, 32, 1))}, "an array of another type"),
        ({"seeds": np.arange(3)}, "do not fit together"),
        ({"corrections": np.full((4, 2), np.inf)}, "no number above 0"),
        ({"sigmas": np.array([{}, {}])}, "no trajectory"),  # pickled
    ],
)
def test_another_file_is_refused(change: dict[str, Any], why: str, guided: Trajectory, tmp_path: Path) -> None:
    trajectory.save(guided, tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as stored:
        arrays = dict(stored)
    np.savez(tmp_path / "t.npz", **{**arrays, **change})
    with pytest.raises(UserError, match=why) as caught:
        trajectory.read(tmp_path / "t.npz")
    assert "\n" not in caught.value.message


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_BYTES", 10_000)
    np.savez_compressed(tmp_path / "t.npz", guided=np.zeros(20_000, np.uint8))
    with pytest.raises(UserError, match="10,000 are the most"):
        trajectory.read(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("guidance", "sampling", "seeds", "why"),
    [
        (GuidanceConfig(), _STEPS, "0", "no guidance acts"),
        (GuidanceConfig(dg_weight=1.0), _STEPS, "0-8", "give 8 at most"),
        (GuidanceConfig(dg_weight=1.0), SamplingConfig(num_steps=3, solver="ddpm"), "0", "calls a posterior"),
    ],
)
def test_what_has_no_trajectory_is_refused(
    guidance: GuidanceConfig, sampling: SamplingConfig, seeds: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        _recorded(guidance, sampling, seeds)
