"""What the solvers of flow matching share: they step states of a path in its time, from noise at 0 to data at 1."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, cast

from dgfast.errors import UserError
from dgfast.solvers.solver import Solver

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.flow import FlowCoordinates, Path

_NOT_OF_A_PATH = (
    "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho", "alpha", "S_churn", "respacing",
    "clip_denoised",
)  # fmt: skip


class FlowSolver(Solver):
    """A solver along a path; its `coords` are a `flow.FlowCoordinates`."""

    function, plain_steps = "velocity", False

    @property
    def path(self) -> Path:
        return cast("FlowCoordinates", self.coords).path

    def times(self, prediction: str) -> list[float]:
        """The times of its steps, the last one's end included, for a network that predicts that: [num_steps + 1].

        Raises:
            UserError: settings that do not go with the path, or say nothing of it.
        """
        self.require_own_settings()
        first, last = self.path.interval(prediction)
        ends = (last, first) if self.config.reverse else (first, last)
        return even(*ends, self.config.num_steps)

    def require_own_settings(self, least: int = 1) -> None:
        """
        Raises:
            UserError: settings of a grid of noise levels, or fewer steps than `least`.
        """
        given = [
            f.name
            for f in fields(self.config)
            if f.name in _NOT_OF_A_PATH and getattr(self.config, f.name) != f.default
        ]
        if given:
            raise UserError(f"{self.name} takes even steps in the time of its path: leave out {', '.join(given)}")
        if self.config.num_steps < least:
            raise UserError(f"--steps {self.config.num_steps}: {self.name} needs at least {least}")

    def scale_of_first_state(self, t: Tensor) -> Tensor:
        """Unit noise is a path's state at its beginning, and images are at its end."""
        import torch

        return torch.ones_like(t)


def even(first: float, last: float, steps: int) -> list[float]:
    """The ends of so many even steps, both ends included."""
    return [*(first + (last - first) * i / steps for i in range(steps)), last]
