"""Numbers that make no training."""

from typing import Any

import pytest

from dgfast.errors import UserError
from dgfast.training.schedule import Schedule


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("images", value) for value in (0, -5)),
        *(("batch", value) for value in (0, -1)),
        *(("lr", value) for value in (0.0, -1.0, float("inf"), float("nan"))),
        *(("weight_decay", value) for value in (-1.0, float("nan"))),
        *(("ema", value) for value in (1.0, 2.0, -0.1, float("nan"))),
        *(("ema_rel", value) for value in (0.0, 1.0, float("nan"))),
        *(("seed", value) for value in (-1, 2**32)),
    ],
)
def test_numbers_that_make_no_training_are_refused_by_their_option(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Schedule(**{"images": 100, name: value})
    assert caught.value.message.startswith(f"--{name.replace('_', '-')} {value:g}" if name != "seed" else "--seed")


def test_edges_that_make_one_are_taken() -> None:
    assert Schedule(images=1, batch=128).steps == 1
    assert Schedule(images=100, ema=0.0, weight_decay=0.0, seed=2**32 - 1).ema == 0
