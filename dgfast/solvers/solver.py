"""What a solver says of itself, and its step: callables in, x out.

All of them step the state x(t) = s(t) (clean + sigma(t) noise) in the time t of a `Coordinates`; t has the shape
[B, 1, 1, 1], because boosting gives every sample a noise level of its own. They do not know what guidance is.

Names of solvers and what they refuse are read by `--help`, without torch, which takes seconds to import. So their files
import torch inside of the functions that call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dgfast.errors import UserError
from dgfast.vp import vp_alpha

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import SamplingConfig
    from dgfast.noise_levels import Coordinates

Call = Callable[..., "tuple[Tensor, ...]"]
"""(x, t) -> (denoised images, log-ratios), or (velocities, log-ratios) along a path; or (x, t, log_least, log_most) ->
what `guided_posterior` returns."""
LAST = ("denoised_last", "sigma_last")
"""The last step's denoised images and noise level [B, 1, 1, 1], for solvers that remember them; before the first step
zeros and infinity."""


@dataclass(frozen=True)
class Solver(ABC):
    """A solver of the probability-flow ODE or of one of its stochastic relatives, under these settings.

    Attributes:
        name: on the command line and in bundles. order: of its error in the size of a step.
        function: which one it calls, see `Call`. points: at how many points of a step, but the last.
        sigma_alone: it steps in sigma, without churn, other schedules and scaling.
        unit_start: it starts at unit variance, as DDPM does: as if the state were all noise.
        takes_eta: its noise has a size, `eta`.
        plain_steps: each step goes toward the denoised images of its own calls; not of earlier ones, nor by a posterior
            or a velocity.
        takes_diffusion: its noise has a size along a path, `diffusion`, and a last step without. reversible: it can go
            back from images to noise.
    """

    config: SamplingConfig
    coords: Coordinates

    name: ClassVar[str]
    order: ClassVar[int]
    function: ClassVar[Literal["denoiser", "posterior", "velocity"]] = "denoiser"
    points: ClassVar[int] = 1
    sigma_alone: ClassVar[bool] = False
    unit_start: ClassVar[bool] = False
    takes_eta: ClassVar[bool] = False
    plain_steps: ClassVar[bool] = True
    takes_diffusion: ClassVar[bool] = False
    reversible: ClassVar[bool] = False

    @classmethod
    def check(cls, config: SamplingConfig) -> None:
        """Raises UserError for settings that it cannot follow."""
        if cls.sigma_alone and (config.S_churn or config.schedule != "linear" or config.scaling != "none"):
            raise UserError(f"{cls.name} takes no churn and only the linear schedule without scaling")
        if config.eta and not cls.takes_eta:
            raise UserError(f"eta {config.eta}: {cls.name} has none, which is the noise of ddim")
        about_noise = config.diffusion, config.diffusion_norm, config.last_step, config.last_size
        if about_noise != ("sigma", 1.0, "mean", 0.04) and not cls.takes_diffusion:
            raise UserError(f"diffusion, diffusion_norm, last_step and last_size are of flow-sde; {cls.name} has none")
        if config.reverse and not cls.reversible:
            raise UserError(f"reverse: {cls.name} does not go from images to noise; flow-euler and flow-heun do")

    @classmethod
    def evaluations(cls, num_steps: int) -> int:
        """Calls of its function in so many steps."""
        return cls.points * (num_steps - 1) + 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """What its step needs beyond x, t, t_next: of "noise", unit normal [B, C, H, W]; "log_least", "log_most" [B],
        see `Step.log_variances`; and `LAST`."""
        return ()

    def scale_of_first_state(self, t: Tensor) -> Tensor:
        """The factor on unit normal latents that makes them the state at time t."""
        if self.unit_start:
            return 1 / vp_alpha(self.coords.sigma(t))
        return self.coords.sigma(t) * self.coords.s(t)

    @abstractmethod
    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state at t_next; and the denoised images and log-ratios at t. Pure.

        Args:
            predict, correct: the function at the first and at the second point; the last step has no second.
            more: `inputs` by name.
        """

    def any_step(
        self, x: Tensor, t: Tensor, t_next: Tensor, predict: Call, correct: Call | None, more: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same whether or not it is the last step, which ends at sigma 0; by the same operations in both cases."""
        return self.step(x, t, t_next, predict, correct, more)
