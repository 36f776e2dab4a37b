"""Noise levels + guided denoiser + solver + runtime = a sampler."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields

import torch
from torch import Tensor, nn

from dgfast.conditions import given
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.devices import device_of, require_float64, seconds_of
from dgfast.errors import UserError
from dgfast.guidance import CarriedGradient
from dgfast.job import GuidanceLike, Job
from dgfast.networks import Networks, one_hot
from dgfast.plan import Step
from dgfast.randomness import MakeStreams, source
from dgfast.runtimes import RuntimeLike, chosen
from dgfast.solvers import LAST, churn
from dgfast.stepping import Stepping, uploaded

OnStep = Callable[[Step, Tensor, Tensor, Tensor], Tensor | None]
"""See `Sampler.integrate`."""


class Sampler:
    """Draws images from a pretrained denoiser under guidance.

    ```python
    sampler = dgfast.Sampler(dgfast.load("mnist32"), guidance=dgfast.GuidanceConfig(dg_weight=1.0))
    images = sampler(seeds=range(64))  # [64, 1, 32, 32], about [-1, 1]
    ```

    Attributes:
        job: what it draws, with the functions that it calls. steps: the plan.
        score_evaluations, score_backwards, guidance_gradients: network calls that one image costs, and backward passes
            through the score network.
        classes: number of classes among which a label chooses, 0 for none. shape: of one image, [C, H, W].
    """

    def __init__(
        self,
        networks: Networks,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        guidance: GuidanceLike = GuidanceConfig(),  # noqa: B008 - frozen
        device: torch.device | str | None = None,
        runtime: RuntimeLike = "eager",
        state_dtype: torch.dtype | None = None,
        noise: str | MakeStreams = "cpu",
    ) -> None:
        """
        Args:
            guidance: a configuration; or a list of guidances of your own, which may hold a configuration too.
            device: where to sample; None: where the denoiser's weights are.
            runtime: what executes the guided denoiser: the name of one of `runtimes.RUNTIMES`; a `runtimes.Runtime`,
                such as `engines.runtime_of` an opened engine file; or a function (function, example) -> function that
                makes a faster callable of a pure one for arguments of the example's shapes.
            state_dtype: type of the solver's state and noise levels; None: `sampling.state_dtype`.
            noise: which generator's numbers the seeds stand for: one of `config.NOISES`, torch's on the CPU or on CUDA,
                wherever they are drawn; or a function that makes `randomness.Streams` of seeds.

        Raises:
            UserError: a guidance whose network is missing, a grid that does not exist, no runtime or source of noise of
                that name, or a device without float64.
        """
        self.device = device_of(networks.denoiser) if device is None else torch.device(device)
        require_float64(self.device)
        self.job = job = Job(networks, sampling, guidance, self.device)
        self.networks, self.guidance, self.sampling = networks, job.guidance, job.sampling
        self.coordinates, self.steps, self.classes, self.shape = job.coordinates, job.steps, job.classes, job.shape
        self.state_dtype: torch.dtype = state_dtype or getattr(torch, sampling.state_dtype)
        self._solver = job.solver
        every_step = getattr(networks.denoiser, "draws_every_step", True)
        churns = bool(job.sampling.S_churn or self.guidance.boosting)
        self._churning = [churns and (every_step or step.churns) for step in self.steps]
        self._streams = source(noise, math.prod(self.shape))
        self._stepping = Stepping(job, chosen(runtime), self.device, self.state_dtype)
        calls = [*self._stepping.guidances.elements()]
        self.score_evaluations = sum(1 + sum(guidance.evaluations for guidance in call) for call in calls)
        self.score_backwards = sum(guidance.backwards for call in calls for guidance in call)
        self.guidance_gradients = sum(guidance.gradients for call in calls for guidance in call)

    def __repr__(self) -> str:
        """Two lines: solver and cost, guidance and device."""
        weights = [f"{f.name}={getattr(self.guidance, f.name)!r}" for f in fields(self.guidance)]
        weights += [type(guidance).__name__ for guidance in self.job.own]
        unset = {f"{f.name}={f.default!r}" for f in fields(self.guidance)}
        return (
            f"Sampler: {self.sampling.solver}, {len(self.steps)} steps from sigma {self.steps[0].sigma:.4g}, "
            f"{self.score_evaluations} score evaluations and {self.guidance_gradients} guidance gradients an image\n"
            f"  guidance: {', '.join(weight for weight in weights if weight not in unset) or 'none'}; on {self.device}"
        )

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | Tensor | None = None,
        on_step: OnStep | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Images of the seeds in one batch: float32 [N, C, H, W], about [-1, 1], on the sampler's device.

        Args:
            seeds: one a sample. Image k depends on seed k (and label k) alone.
            labels: class indices [N]; None takes those of `draw_labels` if the net is conditional.
            on_step, conditions: see `integrate`.

        Raises:
            UserError: no seeds, labels out of range or of another number, a condition that is missing or misshapen,
                NaN in the images.
        """
        if not len(seeds):
            raise UserError("no seeds: give one an image")
        if self.sampling.reverse:
            raise UserError("reverse goes from images to noise: give them to integrate(), seeds have none")
        given(self.job.conditions, conditions, len(seeds), self.device)  # before anything is drawn
        streams = self._streams(seeds)
        latents = streams.normal(self.shape, torch.float32, self.device)
        drawn = streams.labels(self.classes) if self.classes else None
        class_labels = self.class_labels(drawn if labels is None else labels, len(latents))
        draws = sum(self._churning) + len(self.steps) * ("noise" in self._solver.inputs)
        with closing(streams.normals(draws, self.shape, self.state_dtype, self.device)) as noises:
            return self.integrate(latents, class_labels, noises.__next__, on_step, conditions).float()

    def draw_labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The class indices [N] that the seeds themselves give, as in EDM's generator; None without classes."""
        if not self.classes:
            return None
        streams = self._streams(seeds)
        streams.normal(self.shape, torch.float32, torch.device("cpu"))  # which come before them
        return streams.labels(self.classes)

    def class_labels(self, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
        """One-hot rows [count, classes] of class indices; None without any.

        Raises:
            UserError: see `one_hot`.
        """
        return None if labels is None else one_hot(labels, self.classes, count, self.device)

    @torch.no_grad()
    def integrate(
        self,
        latents: Tensor,
        class_labels: Tensor | None = None,
        noise: Callable[[], Tensor] | None = None,
        on_step: OnStep | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the solver from given latents.

        Args:
            latents: unit normal noise [B, C, H, W]; with `SamplingConfig.reverse` images, of which x is the noise.
            class_labels: rows [B, label_dim] or None.
            noise: gives unit normal noise [B, C, H, W]; needed with churn, boosting, eta, ddpm and flow-sde alone.
                Called once a step, but for the steps without churn of networks that do not draw in every step.
            on_step: called after each step with the step, the state x [B, C, H, W] that it arrived at, and the
                denoised images and log-ratios [B] that it set out from (`guidance.OUTSIDE_WINDOW` where no
                discriminator was asked). A state that it returns takes the place of x.
            conditions: what the denoiser declares, by name, one row a sample or one for all; see `conditions.given`.

        Returns:
            x [B, C, H, W] in `state_dtype`, in clean-image coordinates.

        Raises:
            UserError: a condition that is missing or misshapen; x became NaN or infinite; step and sigma are named.
        """
        batch = len(latents)
        extra = given(self.job.conditions, conditions, batch, latents.device)
        x = self.first_state(latents)
        times = uploaded([(step.t, step.t_next) for step in self.steps], x).view(-1, 2, batch, 1, 1, 1)
        log_variances = uploaded([step.log_variances for step in self.steps], x)
        log_ratio = torch.full((batch,), torch.inf, dtype=self.state_dtype, device=latents.device)
        first_bad = torch.full((), len(self.steps), device=latents.device)  # on the device: looking would wait for it
        last = torch.zeros_like(latents, dtype=self.state_dtype), torch.full_like(times[0, 0], torch.inf)
        memory = [torch.zeros_like(last[0])] if self._stepping.remembers else []
        carried = CarriedGradient(self.guidance.dg_reuse) if self.guidance.dg_every > 1 else None
        for step, (t, t_next), bounds in zip(self.steps, times, log_variances, strict=True):
            t_hat, x_hat = self._churn(step, x, t, log_ratio, noise)
            arguments = (x_hat, t_hat, t_next, class_labels, *self._more(last, bounds, noise), *extra, *memory)
            x, denoised, log_ratio, *memory = self._stepping(step, arguments, carried)
            last = denoised, t_hat
            changed = None if on_step is None else on_step(step, x, denoised, log_ratio)
            if changed is not None:
                x = self._accepted(changed, x)
            bad = ~x.isfinite().all() & (first_bad == len(self.steps))
            first_bad = torch.where(bad, step.index, first_bad)
        failed = int(first_bad)
        if failed < len(self.steps):
            raise UserError(
                f"the images became NaN or infinite at step {failed} of {len(self.steps)}, "
                f"sigma {self.steps[failed].sigma:.4g}; {self._remedy(extra)}"
            )
        return x

    def _remedy(self, conditions: Sequence[Tensor]) -> str:
        """What a user can do about images that are not finite."""
        for name, value in zip(self.job.conditions, conditions, strict=True):
            if not bool(value.isfinite().all()):
                return f"condition {name} is infinite itself"
        net = self.networks.denoiser
        half = isinstance(net, nn.Module) and any(p.dtype != torch.float32 for p in net.parameters())
        remedies = ["use --dtype float32"] if half else []
        if any(step.predictor or step.corrector for step in self.steps):
            remedies.insert(0, "lower the guidance weights")
        return " or ".join(remedies) or "no guidance acted: the score network itself returns them, look at its weights"

    def first_state(self, latents: Tensor) -> Tensor:
        """The state [B, C, H, W] in `state_dtype` at the highest noise level, of unit normal latents [B, C, H, W]."""
        t = torch.full((len(latents), 1, 1, 1), self.steps[0].t, dtype=self.state_dtype, device=latents.device)
        return latents.to(self.state_dtype) * self._solver.scale_of_first_state(t)

    def _accepted(self, changed: Tensor, x: Tensor) -> Tensor:
        """What `on_step` returned in the place of the state x, as such a state."""
        if not isinstance(changed, Tensor) or changed.shape != x.shape:
            shape = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise UserError(f"on_step must return a state of shape {list(x.shape)} or None; it returned {shape}")
        return changed.to(x.device, self.state_dtype)

    def prepare(self, batch: int) -> None:
        """Build every function that the plan calls for batches of this size, so that sampling itself compiles none."""
        self._stepping.prepare(batch)
        if self._stepping.captures:
            x, _, labels = self._stepping.example(batch)
            zeros = {name: x.new_zeros(shape) for name, shape in self.job.conditions.items()}
            self.integrate(x.float(), labels, lambda: torch.zeros_like(x), conditions=zeros)

    def forget(self) -> None:
        """Give up all functions that were built, and the memory that captured ones hold; the next call builds anew."""
        self._stepping.functions.clear()

    def estimate(self, batch: int) -> float:
        """Seconds that the network calls of a batch take: each function of the plan is timed once, warm."""
        return sum(count * seconds_of(call, self.device) for call, count in self._stepping.calls(batch))

    def _churn(
        self, step: Step, x: Tensor, t: Tensor, log_ratio: Tensor, noise: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Time and state after the step's churn; those given where no noise is drawn for it."""
        if not self._churning[step.index]:
            return t, x
        assert noise is not None, "churn and boosting need noise"
        gamma = torch.full_like(t, step.gamma)
        S_noise = torch.full_like(t, self.sampling.S_noise)
        if step.boost_gamma is not None:
            judged_fake = log_ratio.view_as(t) < 0
            gamma = torch.where(judged_fake, step.boost_gamma, gamma)
            S_noise = torch.where(judged_fake, 1.0, S_noise)
        coords, sigma = self.coordinates, self.coordinates.sigma(t)
        t_hat = coords.sigma_inv(self.networks.denoiser.round_sigma(sigma + gamma * sigma))
        return t_hat, churn(x, t, t_hat, noise(), S_noise, coords)

    def _more(
        self, last: tuple[Tensor, Tensor], log_variances: Tensor, noise: Callable[[], Tensor] | None
    ) -> tuple[Tensor, ...]:
        """What the solver's step needs beyond state, times and labels: its `inputs`."""
        values, names = dict(zip(LAST, last, strict=True)), self._solver.inputs
        if "noise" in names:
            assert noise is not None, "the solvers ddpm and flow-sde, and eta, need noise"
            values["noise"] = noise()
        values["log_least"], values["log_most"] = log_variances
        return tuple(values[name] for name in names)
