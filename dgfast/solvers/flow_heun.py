"""Heun's method in the time of a path, as SiT's samplers have it (arXiv 2401.08740); it is not Heun's in sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dgfast.solvers.flow import FlowSolver
from dgfast.solvers.solver import Call

if TYPE_CHECKING:
    from torch import Tensor


class FlowHeun(FlowSolver):
    """Averages the velocities at both ends of the step, those of the last step too: the network can look at images."""

    name, order, points, reversible = "flow-heun", 2, 2, True

    @classmethod
    def evaluations(cls, num_steps: int) -> int:
        return 2 * num_steps

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert correct is not None, "every step has a second point"
        velocity, log_ratio = predict(x, t)
        second, _ = correct((x + (t_next - t) * velocity).to(x.dtype), t_next)
        x_next = x + (t_next - t) * (0.5 * velocity + 0.5 * second)
        return x_next.to(x.dtype), self.path.clean(x, velocity, t), log_ratio
