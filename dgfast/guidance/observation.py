"""Guidance by a linear observation of the clean image, y = A x0 + e: inpainting, super-resolution, deblurring.

SDA (arXiv 2306.10574), DPS (2209.14687), MMPS (2405.13712), TMPD (2310.06721), PiGDM (ICLR 2023, openreview
9_gsMA8MRKQ).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from dgfast.errors import UserError
from dgfast.guidance.declaration import Guidance
from dgfast.guidance.finite import require_finite
from dgfast.guidance.likelihood import per_sample, solved, squared_norm, unit
from dgfast.guidance.operators import Mask, tried
from dgfast.guidance.options import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.guidance.likelihood import Operator
    from dgfast.networks import Networks

METHODS = ("sda", "dps", "mmps", "pigdm", "tmpd")
_NEED_THE_NETWORK, _HAVE_GAMMA, _SOLVE = ("mmps", "tmpd"), ("sda", "tmpd"), ("mmps", "pigdm")
MOST_ITERATIONS = 50
"""Of GMRES: a step costs mmps what a call of the denoiser does, so with these a job takes as long as some fifty do."""
_SAFE = 1 - 1e-3  # of |A|^2: it is known to a few digits


@dataclass(frozen=True, eq=False)
class ObservationGuidance(Guidance):
    """D' = D + weight sigma^2 J^T A^T V^-1 (y - A D), J = dD/dx: images of which y is an observation.

    V is the variance of y given x. With the exact one, R + sigma^2 A J A^T, it samples the posterior of Gaussian data.

    Attributes:
        operator: A, images [B, C, H, W] -> [B, ...], linear, of any floating type; `Mask`, or a function of your own.
        observation: y, of what the operator makes of one image: one for all samples, or one a sample [B, ...].
        std: standard deviation of e: a number, or one an entry of y.
        weight: on the correction; 1 is what the theory says, 0 guides nothing. It is zeta of "dps".
        gamma: of "sda". None: |A|^2, from which on dD'/dx lies between 0 and J for Gaussian data, so that no step of
            any size can blow up; `fitted` finds it. Of "tmpd" too, see there.
        method: V. "sda": R + gamma sigma^2. "mmps": the exact one, by so many steps of GMRES. "pigdm": R + rho^2 A A^T
            with rho^2 = sigma^2 s^2 / (sigma^2 + s^2), by steps of GMRES too (one is exact for a mask with one `std`).
            "tmpd": R + diag(sigma^2 A J A^T 1), which is no variance where such a row sum is negative, as among pixels
            that exclude one another: gamma sigma^2 stands there, once gamma is known. "dps": its published step as a
            score, V = |y - A D|.
        iterations: steps of GMRES.
        data_std: s of "pigdm".
        through_network: with J. Without, there is no backward pass, and it over-counts at high noise levels.
    """

    @dataclass(frozen=True)
    class Options:
        observe: str | None = option(
            None, "An npz with `image` and `mask`, what is known of every image.", "FILE", file=True, inside=False
        )
        observe_std: float = option(0.05, "Noise in what is known, in the network's units.", "std")
        observe_weight: float = option(
            1.0, "Weight; 1 is what the theory says, 0 turns it off.", "w", attribute="weight", off=0.0
        )
        observe_method: str = option("sda", "What stands for the likelihood's variance V.", choices=METHODS)
        observe_gamma: float | None = option(
            None, "Of sda's and tmpd's V = std^2 + gamma sigma^2; default: the least that is safe, 1.", "gamma"
        )
        observe_iterations: int = option(1, "Steps of GMRES of mmps and pigdm.", "N", least=1)

    operator: Operator
    observation: Tensor
    std: float | Tensor = 0.05
    weight: float | Tensor = 1.0
    gamma: float | None = None
    method: str = "sda"
    iterations: int = 1
    data_std: float = 1.0
    through_network: bool = True

    name = "guidance by an observation"
    formula = "D + w sigma^2 J^T A^T V^-1 (y - A D)"
    cost = "1 backward of the score net; of mmps one an iteration, of tmpd 2"
    use = "to draw what agrees with pixels, or any linear function of them, that are known"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if not self.through_network and self.method in _NEED_THE_NETWORK:
            raise UserError(f"{self.method} is made of the network's Jacobian: leave through_network on, or use sda")
        if not isinstance(self.iterations, int) or not 1 <= self.iterations <= MOST_ITERATIONS:
            raise UserError(f"iterations {self.iterations} must be a whole number, 1 to {MOST_ITERATIONS}")
        if self.iterations > 1 and self.method not in _SOLVE:
            raise UserError(f"iterations are of {' and '.join(_SOLVE)}; {self.method} solves nothing")
        if self.gamma is not None:
            require_finite("gamma", self.gamma, 0.0)
            if self.method not in _HAVE_GAMMA:
                raise UserError(f"gamma is of {' and '.join(_HAVE_GAMMA)}; {self.method} has none")
        require_finite("weight", self.weight)
        require_finite("std", self.std, 0.0)
        require_finite("data_std", self.data_std, 1e-6)

    @property
    def gradients(self) -> int:
        return 0 if self.through_network else 1

    @property
    def backwards(self) -> int:
        return {"mmps": self.iterations, "tmpd": 2}.get(self.method, 1) if self.through_network else 0

    @classmethod
    def check(cls, config: GuidanceConfig) -> None:
        if config.observe_std < 0 or config.observe_weight < 0:
            raise UserError("observe_std and observe_weight are at least 0")
        if config.observe_gamma is not None and config.observe_method not in _HAVE_GAMMA:
            raise UserError(f"observe_gamma is of sda and tmpd; observe_method {config.observe_method} has none")
        if config.observe_iterations > MOST_ITERATIONS:
            raise UserError(
                f"observe_iterations {config.observe_iterations}: at most {MOST_ITERATIONS}, for mmps has a backward "
                "pass of the score net in each, at every call, and GMRES keeps an image of each"
            )
        if config.observe_iterations > 1 and config.observe_method not in _SOLVE:
            raise UserError(f"observe_iterations is of mmps and pigdm; {config.observe_method} solves nothing")

    @classmethod
    def on(cls, config: GuidanceConfig, second: bool = False) -> bool:
        return config.observe is not None and config.observe_weight != 0

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> ObservationGuidance:
        from dgfast.guidance.observation_file import read

        assert config.observe is not None, "it is on"
        net, side = networks.denoiser, networks.denoiser.img_resolution
        h, w = (side, side) if isinstance(side, int) else side
        image, mask = read(config.observe, (net.img_channels, h, w))
        return cls(
            Mask(mask), image, config.observe_std, config.observe_weight, config.observe_gamma, config.observe_method,
            config.observe_iterations,
        )  # fmt: skip

    def active(self, sigma_low: float, sigma_high: float) -> bool:
        return bool(self.weight)

    def fitted(self, shape: Sequence[int], device: torch.device) -> Self:
        import torch

        operator, y, std = self.operator, self.observation, self.std
        if isinstance(operator, Mask):
            operator = mask = operator.fitted(shape, device)
            one = tuple(shape)
        else:
            one = tuple(tried(operator, shape, device).shape[1:])
        if not isinstance(y, torch.Tensor) or not y.is_floating_point():
            kind = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
            raise UserError(f"the observation is of {kind}; give a tensor of floating numbers, in the network's units")
        if one not in (tuple(y.shape), tuple(y.shape[1:])):
            raise UserError(f"the observation has the shape {list(y.shape)}; of one image {list(one)} can be observed")
        y = y.detach().to(device).reshape(-1, *one)
        if isinstance(operator, Mask):
            y = torch.where(mask.where > 0, y, 0)  # what is not observed may be anything
        if not bool(y.isfinite().all()):
            raise UserError("the observation has values that are no finite numbers")
        if isinstance(std, torch.Tensor):
            std = std.detach().to(device)
            if std.dim() > len(one) or any(a not in (1, b) for a, b in zip(std.shape[::-1], one[::-1], strict=False)):
                raise UserError(f"std has the shape {list(std.shape)}; give a number, or one an entry of {list(one)}")
            if not bool((std.isfinite() & (std >= 0)).all()):
                raise UserError("std must be finite and at least 0")
        return replace(self, operator=operator, observation=y, std=std, gamma=self._safe(operator, shape, device))

    def _safe(self, operator: Operator, shape: Sequence[int], device: torch.device) -> float | None:
        """The gamma of "sda" and "tmpd": the one that was given, or the least that is safe.

        Raises:
            UserError: the one that was given lies below that.
        """
        if self.method not in _HAVE_GAMMA:
            return None
        least = 1.0 if isinstance(operator, Mask) else squared_norm(operator, shape, device)
        if self.gamma is not None and self.gamma < least * _SAFE:
            raise UserError(
                f"gamma {self.gamma:g} lets the correction overshoot, and a solver's steps diverge; the least that is "
                f"safe for this operator is {least:.4g}"
            )
        return least if self.gamma is None else self.gamma

    def images(self) -> dict[str, Tensor]:
        if not isinstance(self.operator, Mask):
            return {}
        return {"observed": self.observation, "observed_where": self.operator.where.expand(self.observation.shape)}

    def with_images(self, given: Mapping[str, Tensor]) -> Self:
        if not isinstance(self.operator, Mask) or "observed" not in given:
            return self
        return replace(self, observation=given["observed"], operator=Mask(given["observed_where"]))

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        import torch

        if self.through_network:
            score = self._score(x, sigma, denoised)
        else:
            with torch.enable_grad():
                clean = denoised.detach().requires_grad_()
                score = self._score(clean, sigma, clean)
        return score, self.weight * sigma**2, None

    def _score(self, source: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
        """J^T A^T V^-1 (y - A D) [B, C, H, W] by backward passes from A D to `source`."""
        import torch

        predicted = self.operator(denoised)

        def pull(v: Tensor) -> Tensor:
            (image,) = torch.autograd.grad(predicted, source, v, retain_graph=True)
            return image

        residual = self._residual(predicted.detach())
        noise, level = self._noise(predicted), per_sample(sigma**2, predicted)
        if self.method == "mmps":

            def apply(v: Tensor) -> tuple[Tensor, Tensor]:
                pulled = pull(v)
                return pulled, noise * v + level * self.operator(pulled)

            return solved(apply, residual, self.iterations)
        if self.method == "dps":
            return pull(unit(residual))
        if self.method == "pigdm":
            share = level * self.data_std**2 / (level + self.data_std**2)
            return pull(solved(self._covariance(denoised, noise, share), residual, self.iterations))
        if self.method == "tmpd":
            spread = self.operator(pull(torch.ones_like(predicted)))
            if self.gamma is not None:
                spread = torch.where(spread > 0, spread, self.gamma)
            return pull(residual / (noise + level * spread))
        if self.gamma is None:
            raise ValueError("gamma is open: `fitted` finds it for the images' shape, as a sampler does")
        return pull(residual / (noise + self.gamma * level))

    def _covariance(self, images: Tensor, noise: Tensor, share: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """v -> (v, (R + share A A^T) v)."""
        import torch

        start = torch.zeros_like(images).requires_grad_()
        made = self.operator(start)

        def apply(v: Tensor) -> tuple[Tensor, Tensor]:
            (image,) = torch.autograd.grad(made, start, v, retain_graph=True)
            return v, noise * v + share * self.operator(image)

        return apply

    def _residual(self, predicted: Tensor) -> Tensor:
        y = self.observation if self.observation.dim() == predicted.dim() else self.observation[None]
        if y.shape[1:] != predicted.shape[1:] or len(y) not in (1, len(predicted)):
            raise UserError(
                f"the observation has the shape {list(self.observation.shape)}; of these {len(predicted)} images "
                f"{list(predicted.shape)} are observed"
            )
        residual = y.to(predicted) - predicted
        return self.operator(residual) if isinstance(self.operator, Mask) else residual

    def _noise(self, predicted: Tensor) -> Tensor:
        """R, of `std`: [1, ...]."""
        import torch

        return torch.as_tensor(self.std).to(predicted).square().expand(predicted.shape[1:])[None]
