"""Guiders for the modular pipelines of diffusers: guidance by a discriminator, and by a second network.

```python
from dgfast.diffusers import Autoguidance, DiscriminatorGuidance

pipeline.update_components(guider=DiscriminatorGuidance(discriminator, pipeline.scheduler, weight=1.0))
```

Each stands around another guider, diffusers' classifier-free guidance for one, and corrects what that one returns. A
guider never sees the images themselves: it notes what the denoiser is called with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dgfast import guidance
from dgfast.errors import UserError
from dgfast.guidance.finite import require_finite
from dgfast.vp import vp_time

try:
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, SchedulerMixin
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
except ImportError as error:
    raise ImportError(
        "dgfast.diffusers needs a diffusers with guiders, 0.36 or newer: pip install -U 'dgfast[latent]'", name=__name__
    ) from error

Conditions = dict[str, tuple[Any, Any]]
"""Inputs of the denoiser by name, with the condition and without, as a pipeline hands them to its guider."""


class _Around(BaseGuidance, ABC):  # type: ignore[misc]  # diffusers ships no types
    """Another guider, and what the denoiser is called with for its conditional prediction."""

    _input_predictions: Sequence[str] = ("pred_cond", "pred_uncond")

    def __init__(self, guider: BaseGuidance | None, weight: float, **arguments: Any) -> None:
        """
        Raises:
            UserError: a guider that is none, or a weight that is no finite number.
        """
        if not isinstance(guider, BaseGuidance | None):
            made = f"the class {guider.__name__}" if isinstance(guider, type) else f"a {type(guider).__name__}"
            raise UserError(f"guider is {made}; give a guider that was made, such as ClassifierFreeGuidance()")
        require_finite("weight", weight)
        arguments["weight"] = weight
        self._arguments = {"guider": guider, **arguments}  # no file could hold them all: `new` makes others of them
        self._guider = ClassifierFreeGuidance(guidance_scale=1.0) if guider is None else guider
        self._hook: Any = None
        self._noted: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._input_predictions = list(self._guider._input_predictions)
        super().__init__()

    def new(self, **changes: Any) -> Self:
        """The same guider with some of its arguments changed."""
        return type(self)(**{**self._arguments, **changes})

    @property
    def num_conditions(self) -> int:
        return int(self._guider.num_conditions)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1  # every guider has the conditional prediction first

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self._guider.set_state(step, num_inference_steps, timestep)
        self._noted = None

    def prepare_inputs(self, data: Conditions) -> list[Any]:
        batches: list[Any] = self._guider.prepare_inputs(data)
        return batches

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, str | tuple[str, str]]) -> list[Any]:
        batches: list[Any] = self._guider.prepare_inputs_from_block_state(data, input_fields)
        return batches

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self._guider.prepare_models(denoiser)
        if self.is_conditional:
            self._hook = denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._guider.cleanup_models(denoiser)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _note(self, denoiser: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._noted = arguments, keywords

    def forward(self, pred_cond: Tensor, **others: Tensor) -> GuiderOutput:
        """What the guider inside makes of the predictions, corrected."""
        if self._noted is None:
            raise UserError("the guider saw no call of the denoiser: prepare_models must come before each prediction")
        result = self._guider.forward(pred_cond, **others)
        result.pred = self._corrected(result.pred, pred_cond, *self._noted)
        return result

    @abstractmethod
    def _corrected(
        self, prediction: Tensor, conditional: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        """The prediction of the guider inside, corrected; the last two are what the denoiser was called with."""


class Autoguidance(_Around):
    """A worse version of the denoiser as reference: p + (w - 1) (p_c - p_ref) (Karras et al., arXiv 2406.02507).

    p is what the guider inside returns, p_c the conditional prediction, p_ref the reference's for the same input. It is
    linear, so noise, velocity and clean images will do alike. diffusers' own `AutoGuidance` drops layers of the one
    network instead.
    """

    def __init__(self, reference: nn.Module, weight: float = 2.0, guider: BaseGuidance | None = None) -> None:
        """
        Args:
            reference: called as the pipeline calls its denoiser, with the same condition; frozen.
            weight: 1 guides nothing; EDM2's presets use 1.7 to 2.9.
            guider: the one inside; None: the conditional prediction alone.

        Raises:
            UserError: a guider that is none, or a weight that is no finite number.
        """
        super().__init__(guider, weight, reference=reference)
        self.register_to_config(weight=weight)
        self._reference, self.weight = reference, weight

    def _corrected(
        self, prediction: Tensor, conditional: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        if self.weight == 1:
            return prediction
        with torch.no_grad():
            result = self._reference(*arguments, **keywords)
        worse = result[0]  # of a tuple, and of the outputs of diffusers' networks
        if worse.shape != conditional.shape:
            raise UserError(f"the reference predicts {[*worse.shape]}, the denoiser {[*conditional.shape]}")
        return prediction + (self.weight - 1) * (conditional - worse)


class DiscriminatorGuidance(_Around):
    """Discriminator guidance (Kim et al., arXiv 2211.17091) of whatever the denoiser predicts.

    The correction of the denoised image, w sigma^2 alpha grad_u log_ratio, becomes one of noise, velocity or flow. The
    level sigma comes from the scheduler; u = x / sqrt(1 + sigma^2) is what such denoisers read.
    """

    def __init__(
        self,
        discriminator: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        scheduler: SchedulerMixin,
        weight: float = 1.0,
        window: Sequence[float] = (0.01, 1.0),
        class_labels: Tensor | None = None,
        time: Callable[[Tensor], Tensor] = vp_time,
        guider: BaseGuidance | None = None,
    ) -> None:
        """
        Args:
            discriminator: (u [B, C, H, W], t [B] in [0, 1], class_labels) -> logit of "real" [B], see
                `guidance.DiscriminatorGuidance`; frozen. In a pipeline of latents it judges latents.
            scheduler: the pipeline's.
            weight: 1 is what the theory says, 0 guides nothing.
            window: smallest and largest VP time at which it acts.
            class_labels: what the discriminator gets as its labels, [B, label_dim] or [1, label_dim].
            time: the time t(sigma) that it reads.
            guider: the one inside; None: the conditional prediction alone.

        Raises:
            UserError: a scheduler whose images or predictions have a scale that is not known here; a guider, weight,
                window or labels that are none.
        """
        super().__init__(
            guider, weight, discriminator=discriminator, scheduler=scheduler, window=window,
            class_labels=class_labels, time=time,
        )  # fmt: skip
        if len(window) != 2 or not window[0] < window[1]:
            raise UserError(f"window {window}: give two times, the first below the second")
        if not isinstance(class_labels, Tensor | None) or (class_labels is not None and class_labels.ndim != 2):
            shape = [*class_labels.shape] if isinstance(class_labels, Tensor) else type(class_labels).__name__
            raise UserError(f"class_labels are {shape}; give a tensor [B, label_dim] or [1, label_dim]")
        self.register_to_config(weight=weight, window=[*window])
        low, high = window
        self._guidance = guidance.DiscriminatorGuidance(discriminator, weight, (low, high), time)
        self._scheduler, self._class_labels = scheduler, class_labels
        self._space = _space(scheduler)

    def _corrected(
        self, prediction: Tensor, conditional: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise UserError(
                "discriminator guidance takes a gradient: run the pipeline under no_grad, not inference_mode"
            )
        level = _sigma(self._scheduler, self._timestep, self._space)
        if not self._guidance.active(level, level):
            return prediction
        read = arguments[0] if arguments else keywords.get("sample", keywords.get("hidden_states"))
        if not isinstance(read, Tensor) or read.ndim != 4 or prediction.ndim != 4:
            raise UserError("discriminator guidance is of images [B, C, H, W]; this pipeline's denoiser reads others")
        sigma = torch.full((len(read),), level, dtype=torch.float64, device=read.device)
        # A denoiser for inpainting reads the mask in further channels.
        x = read[:, : prediction.shape[1]].double() * (1 + level if self._space == "flow" else (1 + level**2) ** 0.5)
        labels = self._class_labels
        if labels is not None and len(labels) not in (1, len(read)):
            raise UserError(f"class_labels are {[*labels.shape]}, of another number than the {len(read)} images")
        labels = None if labels is None else labels.expand(len(read), -1)
        direction, gate, _ = self._guidance.correct(x, sigma, labels, x)
        shift = _SLOPES[self._space](level) * gate.view(-1, 1, 1, 1) * direction
        return prediction + shift.to(prediction.dtype)


# What a prediction gains where the denoised image gains 1, at the level sigma.
_SLOPES: dict[str, Callable[[float], float]] = {
    "epsilon": lambda sigma: -1 / sigma,
    "v_prediction": lambda sigma: -((1 + sigma**2) ** 0.5) / sigma,
    "sample": lambda sigma: 1.0,
    "flow": lambda sigma: -(1 + sigma) / sigma,
}


def _space(scheduler: SchedulerMixin) -> str:
    """What the denoiser of that scheduler predicts, one of `_SLOPES`."""
    if not isinstance(scheduler, SchedulerMixin):
        raise UserError(f"scheduler is a {type(scheduler).__name__}; give the pipeline's own, pipeline.scheduler")
    config, name = scheduler.config, type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas"):
        return "flow"
    predicted = config.get("prediction_type")
    if predicted not in _SLOPES or "sigma_data" in config or not hasattr(scheduler, "alphas_cumprod"):
        known = "epsilon, v_prediction and sample of a variance-preserving process, and flow matching by Euler steps"
        raise UserError(f"{name} with prediction_type {predicted!r} is none that dgfast knows: {known}")
    return str(predicted)


def _sigma(scheduler: SchedulerMixin, timestep: Tensor | float, space: str) -> float:
    """The standard deviation of the noise on clean images at a timestep of the scheduler; it may be infinite."""
    at = (scheduler.timesteps == torch.as_tensor(timestep, device=scheduler.timesteps.device)).nonzero()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        kept = float(scheduler.alphas_cumprod[int(timestep)])
        return ((1 - kept) / kept) ** 0.5 if kept else float("inf")
    if not len(at):
        raise UserError(f"timestep {float(timestep):g} is none of the scheduler's: give the guider the pipeline's own")
    level = float(sigmas[int(at[0])])
    if space != "flow":
        return level
    return level / (1 - level) if level < 1 else float("inf")
