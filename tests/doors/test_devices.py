"""Devices that sampling can't use are refused in one line."""

from typing import Any

import pytest
import torch

import dgfast
from dgfast.devices import pick_device
from dgfast.errors import UserError


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
