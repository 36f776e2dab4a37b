"""A run that is judged by held-out losses keeps the best average, ends in time, and goes on after an interruption."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dgfast.errors import UserError
from dgfast.training.early_stopping import EarlyStopping, mean_of_draws
from dgfast.training.loop import Player, Schedule, fit_together
from tests.training.test_state import CPU, SCHEDULE, fresh, line, weights

_CHECKS = 10  # of 100 steps


def judged(losses: list[float], seen: list[list[float]], patience: int = 3) -> EarlyStopping:
    told: Iterator[float] = iter(losses)

    def judge(net: nn.Module) -> float:
        seen.append(weights(net))
        return next(told)

    return EarlyStopping(judge, checks=_CHECKS, patience=patience)


def run(folder: Path, stopping: EarlyStopping) -> list[float]:
    return weights(fit_together([Player(fresh(), line)], SCHEDULE, folder, CPU, stopping=stopping)[0])


def test_training_ends_after_its_patience_with_the_best_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[float]] = []
    kept = run(tmp_path, judged([3.0, 1.0, 2.0, 1.5, 1.1, 0.0], seen))
    assert "ended at step 50 of 100: the held-out loss was lowest at step 20, whose average" in capsys.readouterr().err
    assert len(seen) == 5 and kept == seen[1]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["held_out_loss"] for record in records if "held_out_loss" in record] == [3.0, 1.0, 2.0, 1.5, 1.1]
    assert records[-1]["step"] == 50
    again: list[list[float]] = []
    assert run(tmp_path, judged([], again)) == kept and not again  # a run that has ended is not gone on with


def test_training_that_improves_to_the_end_is_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[float]] = []
    assert run(tmp_path, judged([1 / (1 + k) for k in range(_CHECKS)], seen)) == seen[-1]
    assert "lowest" not in capsys.readouterr().err


def test_training_interrupted_keeps_the_best_average_so_far(tmp_path: Path) -> None:
    losses = [3.0, 1.0, 2.0, 1.5, 1.1]
    whole = run(tmp_path / "whole", judged(losses, []))
    with pytest.raises(StopIteration):
        run(tmp_path / "parts", judged(losses[:3], []))
    assert run(tmp_path / "parts", judged(losses[3:], [])) == whole


def test_training_judge_draws_the_same_and_leaves_the_generator_alone() -> None:
    judge = mean_of_draws(lambda net, batch: torch.randn(batch).mean(), batch=4, batches=3)
    net = fresh()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert judge(net) == judge(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fit_together([Player(fresh(), line)], Schedule(images=32, batch=16), tmp_path, CPU, recipe={"p_mean": -1.2})
    with pytest.raises(UserError, match="another p_mean"):
        fit_together([Player(fresh(), line)], Schedule(images=32, batch=16), tmp_path, CPU, recipe={"p_mean": 0.0})
