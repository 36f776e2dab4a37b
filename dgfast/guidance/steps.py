"""Guidances that go by the steps of the plan: the step that a call belongs to, looked up by its noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-4  # relative; no plan has two levels so close, and float32 is a thousand times closer


def of_step(values: Sequence[float], levels: Sequence[float], second: bool, sigma: Tensor) -> Tensor:
    """For each noise level sigma [B], the value [B] of the step in which it is asked for.

    Args:
        values: one a step. levels: where the steps begin, highest first, and 0, where the last one ends.
        second: the calls are at the solver's second point, where their step ends.

    At the first point that is the step from the nearest level at or below: churn goes up from there. A rise beyond the
    level before, on a grid finer than the churn, counts as the earlier step.
    """
    import torch

    bounds = levels[1:] if second else levels[:-1]
    here = torch.tensor([(1 - _ROUNDING) * level for level in bounds], dtype=sigma.dtype, device=sigma.device)
    above = (sigma[:, None] < here).sum(1).clamp(max=len(values) - 1)
    return torch.tensor(values, dtype=sigma.dtype, device=sigma.device)[above]
