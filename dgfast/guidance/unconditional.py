"""What the guidances by the same network without a class share: that prediction, where they act, what they refuse."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import GUIDANCES, Guidance
from dgfast.guidance.options import option
from dgfast.guidance.schedule import inside, reaches

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.compose import Denoiser
    from dgfast.networks import Networks

COST = "1 forward of the score net in the interval"


def interval_option() -> tuple[float, float]:
    """The option of all of them (arXiv 2404.07724)."""
    return option((0.0, math.inf), "Noise levels between which guidance by the net without class acts.", "sigma,sigma")


@dataclass(frozen=True, eq=False)
class UnconditionalGuidance(Guidance):
    """A correction of D_c made of D_c and D_u, the predictions of one network with and without a class.

    Attributes:
        denoiser: the conditional denoiser; without labels it gives D_u.
        scale: 1 guides nothing.
        interval: (low, high], the noise levels sigma at which it acts, judged for each sample; a low of 0 is no bound.
    """

    denoiser: Denoiser
    scale: float | Tensor
    interval: tuple[float, float] = (0.0, math.inf)

    cost = COST
    evaluations = 1

    @abstractmethod
    def mixed(self, x: Tensor, sigma: Tensor, denoised: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        """Direction [B, C, H, W] and gate [B] of the correction of `denoised`, D_c; inside of the interval."""

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        scales = [
            next(iter(kind.weights().values())).name
            for kind in GUIDANCES
            if issubclass(kind, UnconditionalGuidance) and kind.on(config)
        ]
        if len(scales) > 1:
            raise UserError(
                f"{scales[0]} and {scales[1]} both mix in the prediction without class: leave one of them off"
            )

    @classmethod
    def conditional(cls, networks: Networks) -> Denoiser:
        """The denoiser, if it gives both predictions.

        Raises:
            UserError: it has no classes, or was never trained without.
        """
        if not networks.denoiser.label_dim:
            raise UserError(f"{cls.name} needs a conditional score network")
        if getattr(networks.denoiser, "null_class", 0) is None:
            raise UserError(
                f"{cls.name} needs a score network that was trained without labels too; an unconditional network "
                "as reference guides by --autoguidance"
            )
        return networks.denoiser

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.scale != 1) and self.reaches(sigma_low, sigma_high)

    def reaches(self, sigma_low: float, sigma_high: float) -> bool:
        """Whether any of these noise levels is inside of the interval."""
        return reaches(self.interval, sigma_low, sigma_high)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        unconditional = self.denoiser(x, sigma, None).to(denoised.dtype)
        direction, gate = self.mixed(x, sigma, denoised, unconditional)
        return direction, gate * inside(self.interval, sigma), None
