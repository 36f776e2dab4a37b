"""The averaged weights of a run: which steps they are made of, and that none is the random start's."""

import numpy as np
import pytest
import torch
from torch import nn

from dgfast.errors import UserError
from dgfast.training.averaging import averaged, exponent


def shares(steps: int, decay: float, width: float | None) -> np.ndarray:
    """Share of each step's weights in the average: row i of an identity matrix is what step i set."""
    net = nn.Linear(steps, 1, bias=False)
    average = averaged(net, decay, width)
    for step in range(steps):
        with torch.no_grad():
            net.weight.copy_(torch.eye(steps)[step : step + 1])
        average.update_parameters(net)
    return average.module.weight[0].detach().double().numpy()  # type: ignore[index]


def test_exponential_average_forgets_the_start_as_it_forgets_every_step() -> None:
    found = shares(50, decay=0.99, width=None)
    wanted = 0.99 ** np.arange(49, -1, -1.0)
    assert np.allclose(found, wanted / wanted.sum(), atol=1e-6)
    assert found[0] < 0.02 < 0.99**49  # the second is what an average that begins at the first weights has of them


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_function_average_has_the_width_that_is_asked_for(width: float) -> None:
    found = shares(1000, decay=0.0, width=width)
    times = (np.arange(1000) + 0.5) / 1000
    mean = (found * times).sum()
    assert found.sum() == pytest.approx(1, abs=1e-4)
    assert np.sqrt((found * (times - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


def test_power_function_has_the_exponents_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize(("decay", "width"), [(0.9, 0.0), (0.9, 0.3), (0.9, float("nan")), (1.0, None), (-0.1, None)])
def test_averages_that_are_none_are_refused(decay: float, width: float | None) -> None:
    with pytest.raises(UserError, match="average has a"):
        averaged(nn.Linear(1, 1), decay, width)
