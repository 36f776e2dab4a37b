"""A training that is cut off at the worst moment, while its state is written, and one whose state is no state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgfast import ops
from dgfast.errors import StoppedError, StorageError, UserError
from dgfast.stopping import Terminated
from dgfast.training.loop import Player, Schedule, fit, fit_together

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


def test_training_of_data_that_changed_does_not_go_on(tmp_path: Path) -> None:
    before = {"content of --data": "a", "net": {"width": 1}}
    fit_together([Player(fresh(), line)], SCHEDULE, tmp_path, CPU, recipe=before)
    for after, changed in (({"content of --data": "b"}, "content of --data"), ({"net": {"width": 2}}, "net")):
        with pytest.raises(UserError, match=f"a run with another {changed}; remove it to start anew"):
            fit_together([Player(fresh(), line)], SCHEDULE, tmp_path, CPU, recipe=before | after)


def test_one_training_at_a_time_is_let_into_a_folder(tmp_path: Path) -> None:
    def twice(net: nn.Module, batch: int) -> Tensor:
        with pytest.raises(UserError, match="another training is at work there"):
            fit(fresh(), line, SCHEDULE, tmp_path, CPU)
        return line(net, batch)

    whole = weights(fit(fresh(), twice, replace(SCHEDULE, images=16), tmp_path, CPU))
    assert weights(fit(fresh(), line, replace(SCHEDULE, images=16), tmp_path, CPU)) == whole


def test_full_disk_is_one_line_and_the_state_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(fit(fresh(), line, SCHEDULE, tmp_path / "whole", CPU))
    saved, save = 0, torch.save

    def full(state: dict[str, Any], file: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 40:
            raise OSError(28, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StorageError, match=r"parts cannot be written .*No space left") as caught:
            fit(fresh(), line, SCHEDULE, tmp_path / "parts", CPU)
    assert caught.value.exit_code == 4 and not list((tmp_path / "parts").glob("*.partial"))
    assert weights(fit(fresh(), line, SCHEDULE, tmp_path / "parts", CPU)) == whole
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/folder cannot be written"):
        fit(fresh(), line, SCHEDULE, tmp_path / "file/folder", CPU)


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_signals_end_a_training_by_their_exit_codes(tmp_path: Path, signal: type[BaseException], code: int) -> None:
    def stopped(net: nn.Module, batch: int) -> Tensor:
        raise signal

    with pytest.raises(StoppedError, match="interrupted at step 0; nothing was saved yet") as caught:
        fit(fresh(), stopped, SCHEDULE, tmp_path, CPU)
    assert caught.value.exit_code == code


def test_loss_that_is_none_from_the_start_says_that_nothing_was_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss is nan at step 0; nothing was kept: lower --lr"):
        fit(fresh(), lambda net, batch: float("nan") * line(net, batch), SCHEDULE, tmp_path, CPU)


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
    with pytest.raises(UserError, match="another dtype"):  # it was one of float32
        fit(fresh(), line, replace(SCHEDULE, dtype="bf16"), tmp_path, CPU)


def test_normalisation_is_float32_under_autocast() -> None:
    x = 30 + torch.randn(2, 8, 4, 4)
    for given in (x, x.bfloat16()):  # as a convolution before it leaves its result
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.group_norm_silu(given, 2, torch.ones(8), torch.zeros(8), 1e-5)
        assert y.dtype == torch.float32
        assert torch.equal(y, ops.group_norm_silu(given.float(), 2, torch.ones(8), torch.zeros(8), 1e-5))
