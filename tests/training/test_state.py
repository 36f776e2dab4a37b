"""A training that is cut off at the worst moment, while its state is written, and one whose state is no state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import ops
from dgfast.errors import UserError
from dgfast.training.loop import Schedule, fit

CPU = torch.device("cpu")
SCHEDULE = Schedule(images=1600, batch=16, lr=0.05)


def line(net: nn.Module, batch: int) -> Tensor:
    """Regression to y = 3 x + 1."""
    x = torch.randn(batch, 1)
    return ((net(x) - 3 * x - 1) ** 2).mean()


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def weights(net: nn.Module) -> list[float]:
    return [float(parameter.detach()) for parameter in net.parameters()]


def test_training_torn_while_it_saves_goes_on_from_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(fit(fresh(), line, SCHEDULE, tmp_path / "whole", CPU))
    saved, save = 0, torch.save

    def torn(state: dict[str, Any], file: Any) -> None:
        nonlocal saved
        saved += 1
        save(state, file)
        if saved == 40:  # the power fails when half of the bytes are on the disk
            file.truncate(file.tell() // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(UserError, match="the same command goes on"):
            fit(fresh(), line, SCHEDULE, tmp_path / "parts", CPU)
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 39
    assert weights(fit(fresh(), line, SCHEDULE, tmp_path / "parts", CPU)) == whole


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_training_state_that_is_torn_is_one_line(tmp_path: Path, share: float) -> None:
    fit(fresh(), line, SCHEDULE, tmp_path, CPU)
    path = tmp_path / "state.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"state\.pt.*remove it to start anew") as caught:
        fit(fresh(), line, SCHEDULE, tmp_path, CPU)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [[], {"step": 3}, {"schedule": None, "step": 3}, "net", {"net": {}}])
def test_training_state_of_something_else_is_one_line(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt.*remove it to start anew"):
        fit(fresh(), line, SCHEDULE, tmp_path, CPU)


def test_training_state_of_another_network_is_one_line(tmp_path: Path) -> None:
    fit(fresh(), line, SCHEDULE, tmp_path, CPU)
    with pytest.raises(UserError, match=r"state\.pt.*remove it to start anew"):
        fit(nn.Linear(1, 1, bias=False), line, SCHEDULE, tmp_path, CPU)


def test_bf16_rounds_products_and_nothing_else(tmp_path: Path) -> None:
    products: list[torch.dtype] = []

    def loss(net: nn.Module, batch: int) -> Tensor:
        x = torch.randn(batch, 1)
        y = net(x)
        products.append(y.dtype)
        return ((y - 3 * x - 1) ** 2).mean()

    exact = weights(fit(fresh(), line, SCHEDULE, tmp_path / "float32", CPU))
    rounded = fit(fresh(), loss, replace(SCHEDULE, dtype="bf16"), tmp_path / "bf16", CPU)
    assert set(products) == {torch.bfloat16}
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    assert weights(rounded) == pytest.approx(exact, abs=0.02)
    with pytest.raises(UserError, match="another dtype"):
        fit(fresh(), line, SCHEDULE, tmp_path / "bf16", CPU)


def test_state_from_before_there_was_a_dtype_goes_on(tmp_path: Path) -> None:
    whole = weights(fit(fresh(), line, SCHEDULE, tmp_path, CPU))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["schedule"]["dtype"]
    torch.save(state, tmp_path / "state.pt")
    assert weights(fit(fresh(), line, SCHEDULE, tmp_path, CPU)) == whole


def test_normalisation_is_float32_under_autocast() -> None:
    x = 30 + torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), 1e-5)
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.group_norm_silu(x, 2, torch.ones(8), torch.zeros(8), 1e-5))
