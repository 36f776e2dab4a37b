"""Guidance by a loss on the predicted clean image (UGD, arXiv 2302.07121; FreeDoM, arXiv 2303.09833)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgfast.errors import UserError, one_line
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.finite import require_finite
from dgfast.guidance.gradient import normalized

if TYPE_CHECKING:
    from torch import Tensor

    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSS_NORMALIZATIONS = ("none", "rms")


@dataclass(frozen=True, eq=False)
class LossGuidance(Guidance):
    """D' = D - weight sigma^2 grad_x loss(D): it samples p(x0) exp(-weight loss(x0)), as far as D stands for x0.

    The gradient goes back through the score network. Its Jacobian is Cov(x0 | x) / sigma^2, so the correction fades by
    itself where x says nothing of x0 yet. Without the network, the gradient is with respect to D alone: there is no
    backward pass, and at high noise levels the correction is too large by sigma^2 / Cov(x0).

    Attributes:
        loss: (x [B, C, H, W], t [B], x_0 [B, C, H, W]) -> one number a sample [B]; or a term of the score of x, of x's
            shape, which is taken as it is. t is sigma, x_0 is D. This is PhysicsNeMo's protocol of guidances for its
            `DPSScorePredictor`. All of them have the type of the sampler's state, float64 by default.
        weight: 0 guides nothing.
        through_network: let the gradient go through the score network.
        normalize: "none"; or "rms", FreeDoM's: D' = D - weight rms(x - D) g / rms(g) with g the gradient, both of each
            sample by itself. The loss's own scale no longer counts; 0.02 is their weight.
    """

    loss: Loss
    weight: float | Tensor
    through_network: bool = True
    normalize: str = "none"

    name = "guidance by a loss"
    formula = "D - w sigma^2 grad_x loss(D)"
    cost = "1 backward of the score net; 1 gradient without it"
    use = "to pull toward anything that a loss can say"

    def __post_init__(self) -> None:
        if self.normalize not in LOSS_NORMALIZATIONS:
            raise UserError(f"normalize {self.normalize!r} is not one of {', '.join(LOSS_NORMALIZATIONS)}")
        if not callable(self.loss):
            raise UserError(f"the loss is a {type(self.loss).__name__}; give a function (x, t, x_0)")
        require_finite("weight", self.weight)

    @property
    def gradients(self) -> int:
        return 0 if self.through_network else 1

    @property
    def backwards(self) -> int:
        return 1 if self.through_network else 0

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.weight)

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        import torch

        if self.through_network:
            direction = self._score(x, sigma, denoised, x)
        else:
            with torch.enable_grad():
                clean = denoised.detach().requires_grad_()
                direction = self._score(x, sigma, clean, clean)
        if self.normalize == "none":
            return direction, self.weight * sigma**2, None
        size = (x - denoised).detach().square().mean((1, 2, 3)).sqrt()
        return normalized(direction, "sample_l2") * math.sqrt(direction[0].numel()), self.weight * size, None

    def _score(self, x: Tensor, sigma: Tensor, clean: Tensor, source: Tensor) -> Tensor:
        """Minus the gradient of the loss with respect to `source`, or the term of the score that the loss returned."""
        import torch

        try:
            # It may change its arguments in place, and nobody else's with that.
            value = self.loss(x, sigma.clone(), clean.clone())
        except RuntimeError as error:
            if self.through_network or "grad" not in str(error):
                raise
            raise UserError(
                "the loss takes a gradient of its own, by something that has none: with through_network=False x_0 "
                f"alone has one ({one_line(error)})"
            ) from error
        if isinstance(value, torch.Tensor) and value.shape == x.shape:
            return value.detach()
        if not isinstance(value, torch.Tensor) or value.shape != sigma.shape or value.is_complex():
            of = f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"the loss must be one number a sample, {list(sigma.shape)}, or a term of the score, {list(x.shape)}; "
                f"it is {of}"
            )
        if not value.requires_grad:
            raise UserError("the loss does not depend on x_0: there is nothing to guide by")
        (gradient,) = torch.autograd.grad(value.sum(), source, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError("the loss depends on something else that has a gradient, and not on x_0: guide by x_0")
        return -gradient
