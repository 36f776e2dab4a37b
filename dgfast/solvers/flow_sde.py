"""SDEs with the distributions of a path, whatever their noise (SiT, arXiv 2401.08740, section 2.3).

    dX = (v + w score) dt + sqrt(2 w) dW

Their last step takes no noise: near the data its share would be all that is left to see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.solvers.flow import FlowSolver, even
from dgfast.solvers.solver import Call

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import SamplingConfig
    from dgfast.flow import Path

DIFFUSIONS = ("sigma", "linear", "sbdm", "constant", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def diffusion(form: str, norm: float, t: Tensor, path: Path) -> Tensor:
    """w(t) of that form, of t's shape.

    In the forms' order: `norm` times the path's spread, 1 - t, g^2 / 2 of the SDE that noises along the path, and 1;
    (norm cos(pi t) + 1)^2 / 4; norm sin^2(pi t).
    """
    import torch

    forms: dict[str, Callable[[], Tensor]] = {
        "sigma": lambda: norm * path.spread(t),
        "linear": lambda: norm * (1 - t),
        "sbdm": lambda: norm * path.diffusion_of_noising(t),
        "constant": lambda: norm * torch.ones_like(t),
        "decreasing": lambda: 0.25 * (norm * (math.pi * t).cos() + 1) ** 2,
        "increasing-decreasing": lambda: norm * (math.pi * t).sin() ** 2,
    }
    return forms[form]()


class FlowSDE(FlowSolver):
    """Euler and Maruyama's method."""

    name, order, takes_diffusion = "flow-sde", 1, True

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("noise",)

    def times(self, prediction: str) -> list[float]:
        """See `FlowSolver.times`; the last step, if there is one, goes to the end of the path.

        Raises:
            UserError: noise that is infinite at the beginning, or no other step than the last.
        """
        self.require_own_settings(least=1 if self.config.last_step == "none" else 2)
        config, (first, last) = self.config, self.path.interval(prediction)
        if config.diffusion == "sbdm" and first == 0 and self.path.begins_in_noise:
            raise UserError(
                f"--diffusion sbdm is infinite where the path {self.path.name} begins: take another, such as sigma"
            )
        if config.last_step == "none":
            return even(first, last, config.num_steps)
        return [*even(first, 1 - config.last_size, config.num_steps - 1), 1.0]

    def drift(self, x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """v + w score [B, C, H, W]."""
        return velocity + self._diffusion(t) * self.path.score(x, velocity, t)

    def noised(self, x: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
        """x with the noise of a step."""
        return x + (2 * self._diffusion(t) * (t_next - t)).clip(min=0).sqrt() * noise

    def ended(self, usual: Tensor, x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state after a step: `usual`, or after the last one, to t_next = 1, what that is."""
        import torch

        if self.config.last_step == "none":
            return usual.to(x.dtype)
        if self.config.last_step == "tweedie":
            last = self.path.clean(x, velocity, t)
        else:
            way = velocity if self.config.last_step == "euler" else self.drift(x, velocity, t)
            last = x + (t_next - t) * way
        return torch.where(t_next < 1, usual, last).to(x.dtype)

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        velocity, log_ratio = predict(x, t)
        usual = self.noised(x, t, t_next, more["noise"]) + (t_next - t) * self.drift(x, velocity, t)
        return self.ended(usual, x, velocity, t, t_next), self.path.clean(x, velocity, t), log_ratio

    def _diffusion(self, t: Tensor) -> Tensor:
        return diffusion(self.config.diffusion, self.config.diffusion_norm, t, self.path)


class FlowSDEHeun(FlowSDE):
    """Adds the noise first, then averages the drifts at both ends of the step."""

    name, points = "flow-sde-heun", 2

    @classmethod
    def check(cls, config: SamplingConfig) -> None:
        super().check(config)
        if config.last_step == "none":
            raise UserError(f"{cls.name} cannot look at the end of the path: give a last_step other than none")

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        going_on = t_next < 1
        x_hat = torch.where(going_on, self.noised(x, t, t_next, more["noise"]), x).to(x.dtype)
        velocity, log_ratio = predict(x_hat, t)
        denoised = self.path.clean(x_hat, velocity, t)
        if correct is None:
            return self.ended(x_hat, x_hat, velocity, t, t_next), denoised, log_ratio
        drift, at = self.drift(x_hat, velocity, t), torch.where(going_on, t_next, t)  # no score is at the end
        x_prime = (x_hat + (t_next - t) * drift).to(x.dtype)
        second = self.drift(x_prime, correct(x_prime, at)[0], at)
        usual = x_hat + (t_next - t) * 0.5 * (drift + second)
        return self.ended(usual, x_hat, velocity, t, t_next), denoised, log_ratio
