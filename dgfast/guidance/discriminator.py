"""Discriminator guidance (Kim et al., arXiv 2211.17091): add the gradient of the log-ratio log d / (1 - d)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.gradient import OUTSIDE_WINDOW, log_density_gradient
from dgfast.guidance.options import option
from dgfast.guidance.schedule import CONSTANT, WeightSchedule
from dgfast.vp import vp_sigma, vp_time

if TYPE_CHECKING:
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

    Discriminator = Callable[[Tensor, Tensor, Tensor | None], Tensor]

REUSES = ("hold", "linear")

LOGIT_LIMIT = math.log((1 - 1e-5) / 1e-5)
"""DG clips d to [1e-5, 1 - 1e-5]: in the logit, a clamp beyond which the gradient is exactly zero."""


@dataclass(frozen=True, eq=False)
class DiscriminatorGuidance(Guidance):
    """D' = D + weight sigma^2 alpha grad_u clamp(logit(u, t(sigma), y)), within a window of the VP time tau.

    Attributes:
        discriminator: (u [B, C, H, W] at VP scale, t [B] in [0, 1], class_labels [B, label_dim] or None) -> logit of
            "real", [B] or [B, 1]; frozen.
        weight: 1 is what the theory says; DG's tables use 1 to 2.
        window: smallest and largest tau at which it acts, judged for each sample.
        time: the time t(sigma) that the discriminator reads.
        published_window: judge the window by the smallest tau of the batch, as DG's code does, so that one sample
            below the window switches guidance off for all. For reproducing published numbers only.
        boost: factor on the guidance of the samples with negative log-ratio; DG's boosting uses 2 in every second step.
        schedule: factor on the weight along the trajectory.
    """

    @dataclass(frozen=True)
    class Options:
        dg_weight: float = option(0.0, "Weight; 0 turns it off.", "w", attribute="weight")
        dg_weight_2nd: float = option(
            0.0, "The same at the solver's second point.", "w", attribute="weight", second=True
        )
        dg_window: tuple[float, float] = option(
            (0.01, 1.0), "VP times between which it acts.", "tau,tau", of_network=True
        )
        dg_every: int = option(
            1, "Compute the discriminator's gradient at every so many guided calls only.", "K", least=1, exported=False
        )
        dg_reuse: str = option("hold", "What the calls between use.", choices=REUSES, exported=False)
        boosting: bool = option(
            False, "DG's boosting, for conditional nets.", attribute="boost", input="dg_boost", off=1.0
        )
        published_window: bool = option(False, "Judge the window by the batch, as DG's code does.")
        dg_schedule: tuple[tuple[float, float], ...] = option(
            (), "Factor on --dg-weight by VP time, linear between points.", "tau:factor,..."
        )

    discriminator: Discriminator
    weight: float | Tensor = 1.0
    window: tuple[float, float] = (0.01, 1.0)
    time: Callable[[Tensor], Tensor] = vp_time
    published_window: bool = False
    boost: float | Tensor | None = None
    schedule: WeightSchedule = CONSTANT

    name = "discriminator guidance"
    formula = "D + w sigma^2 grad_x log d / (1 - d)"
    cost = "1 gradient in the window"
    use = "to correct what the score net gets wrong"
    roles = ("discriminator", "classifier")  # a head on the classifier's features
    gradients = 1

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.dg_every > 1 and config.boosting:
            raise UserError("boosting judges every call by its own log-ratio; it does not go with dg_every above 1")
        if config.boosting and not config.dg_weight:
            raise UserError("boosting needs dg_weight; give it one other than 0")

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> DiscriminatorGuidance:
        net, schedule = cls.needed(networks.discriminator, "discriminator"), WeightSchedule(config.dg_schedule)
        window, published = config.dg_window, config.published_window
        return cls(net, config.dg_weight, window, networks.time, published, schedule=schedule)

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        import torch

        low, high = (float(vp_sigma(torch.tensor(tau, dtype=torch.float64))) for tau in self.window)
        # A grid level on the window's edge must count as inside whatever the rounding; `correct` has the last word.
        inside = sigma_high >= low * (1 - 1e-6) and sigma_low <= high * (1 + 1e-6)
        return bool(self.weight) and inside and self.schedule.active(sigma_low, sigma_high)

    def inside(self, sigma: Tensor) -> Tensor:
        """Which samples [B] it guides at the noise levels sigma [B]."""
        tau = vp_time(sigma)
        if self.published_window:
            tau = tau.amin().expand_as(tau)
        return (self.window[0] <= tau) & (tau <= self.window[1])

    def weight_at(self, sigma: Tensor) -> Tensor:
        """The weight at the noise levels sigma [B], 0 outside the window: [B]."""
        return self.weight * self.schedule(sigma) * self.inside(sigma).to(sigma.dtype)

    def log_ratio(self, u: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """log d / (1 - d), gated to +-11.51, [B]; u = alpha x at the noise level sigma [B]."""
        logit = self.discriminator(u, self.time(sigma), class_labels).float().reshape(-1)
        return logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        gradient, gate, log_ratio = log_density_gradient(lambda u: self.log_ratio(u, sigma, class_labels), x, sigma)
        log_ratio = torch.where(self.inside(sigma), log_ratio, OUTSIDE_WINDOW)
        weight = self.weight_at(sigma)
        if self.boost is not None:
            weight = torch.where(log_ratio < 0, weight * self.boost, weight)
        return gradient, weight * gate, log_ratio
