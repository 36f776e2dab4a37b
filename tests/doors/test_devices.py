"""Devices that sampling can't use are refused in one line."""

from typing import Any

import pytest
import torch

import dgfast
from dgfast.devices import describe, own_device, pick_device, seconds_of
from dgfast.errors import UserError
from tests.support.pretended_cuda import CUDA, NAME, pretended_cuda


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a Mac: every device is there, and none has float64."""
    empty = torch.empty

    def of_a_mac(*size: int, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        if dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as it has none.")
        return empty(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", of_a_mac)


@pytest.mark.usefixtures("without_float64")
def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(UserError, match=r"^device mps has no float64.*use cpu$"):
        pick_device("mps")


def test_a_sampler_refuses_a_device_without_float64(request: pytest.FixtureRequest) -> None:
    networks = dgfast.load("mnist32")
    request.getfixturevalue("without_float64")
    with pytest.raises(UserError, match="has no float64"):
        dgfast.Sampler(networks, device="mps")


def test_a_gpu_is_taken_where_there_is_one() -> None:
    assert pick_device(None).type == "cpu" or torch.cuda.is_available()
    with pretended_cuda():
        assert describe(pick_device(None)) == f"cuda ({NAME})"


def test_seconds_on_a_gpu_are_those_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"waited for {device}"))
    assert seconds_of(lambda: events.append("called"), CUDA) >= 0
    assert events == ["called", "waited for cuda:0"] * 2


def test_processes_on_one_machine_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert [own_device(None, rank).index for rank in range(4)] == [0, 1, 0, 1]
        assert own_device("cuda:1", 0) == torch.device("cuda", 1)
        monkeypatch.undo()
