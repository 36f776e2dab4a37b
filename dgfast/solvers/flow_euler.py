"""Euler's method in the time of a path (SiT, arXiv 2401.08740); in exact arithmetic the steps are Euler's in sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.flow import FlowSolver
from dgfast.solvers.solver import Call

if TYPE_CHECKING:
    from torch import Tensor


class FlowEuler(FlowSolver):
    """Follows the velocity at the beginning of the step."""

    name, order, reversible = "flow-euler", 1, True

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        velocity, log_ratio = predict(x, t)
        return (x + (t_next - t) * velocity).to(x.dtype), self.path.clean(x, velocity, t), log_ratio
