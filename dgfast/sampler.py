"""Noise levels + guided denoiser + solver + runtime = a sampler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    CarriedGradient,
    DiscriminatorGuidance,
    Guidance,
    gradient_keeping_denoiser,
    guided_denoiser,
)
from dgfast.labels import one_hot
from dgfast.networks import Networks
from dgfast.noise_levels import coordinates, sigma_bounds, sigma_grid
from dgfast.plan import Step, plan
from dgfast.randomness import SeedStreams
from dgfast.solvers import churn, dpmpp_2m_step, euler_step, heun_step

Function = Callable[..., tuple[Tensor, ...]]
Runtime = Callable[[Function, tuple[Tensor | None, ...]], Function]
"""Makes a faster callable of a pure function of tensors (or None), for the shapes of the example."""
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Sampler:
    """Draws images from a pretrained denoiser under guidance.

    ```python
    sampler = dgfast.Sampler(dgfast.load("mnist32"), guidance=dgfast.GuidanceConfig(dg_weight=1.0))
    images = sampler(seeds=range(64))  # [64, 1, 32, 32], about [-1, 1]
    ```

    Attributes:
        steps: the plan. score_evaluations, guidance_gradients: network calls that one image costs.
    """

    def __init__(
        self,
        networks: Networks,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        guidance: GuidanceConfig = GuidanceConfig(),  # noqa: B008 - frozen
        device: torch.device | str | None = None,
        runtime: Runtime | None = None,
        state_dtype: torch.dtype = torch.float64,
        step_runtime: Runtime | None = None,
    ) -> None:
        """
        Args:
            device: where to sample; None: where the denoiser's weights are.
            runtime: makes a faster callable of the guided denoiser for one shape, such as `runtimes.compiled.build`;
                None runs it as it is.
            step_runtime: the same for a whole step of the solver, such as `runtimes.cuda_graph.build`.
            state_dtype: type of the solver's state; float64 as EDM's.

        Raises:
            UserError: a guidance whose network is missing, or a grid that does not exist.
        """
        self.networks, self.sampling, self.guidance = networks, sampling, guidance
        net = networks.denoiser
        weights = net.parameters() if isinstance(net, nn.Module) else iter(())
        at = next((parameter.device for parameter in weights), torch.device("cpu"))
        self.device, self.state_dtype = at if device is None else torch.device(device), state_dtype
        self._runtime, self._step_runtime = runtime, step_runtime
        self._functions: dict[tuple[object, ...], Function] = {}
        low, high = sigma_bounds(sampling, net.sigma_min, net.sigma_max)
        self.coordinates = coordinates(sampling, low, high)
        grid = sigma_grid(sampling, low, high).to(self.device)
        self.steps = plan(networks, sampling, guidance, grid, self.coordinates)
        calls = [g for step in self.steps for g in (step.predictor, step.corrector) if g is not None]
        self.score_evaluations = sum(1 + sum(guidance.evaluations for guidance in call) for call in calls)
        self.guidance_gradients = sum(guidance.gradients for call in calls for guidance in call)

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | Tensor | None = None,
        on_step: Callable[[Step, Tensor], None] | None = None,
    ) -> Tensor:
        """Images of the seeds in one batch: float32 [N, C, H, W], about [-1, 1], on the sampler's device.

        Args:
            seeds: one a sample. Image k depends on seed k (and label k) alone.
            labels: class indices [N]; None takes those of `draw_labels` if the net is conditional.
            on_step: see `integrate`.

        Raises:
            UserError: no seeds, labels out of range or of another number, NaN in the images.
        """
        if not len(seeds):
            raise UserError("no seeds: give one an image")
        net = self.networks.denoiser
        streams = SeedStreams(seeds)
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        latents = streams.normal(shape, torch.float32, self.device)
        drawn = streams.labels(net.label_dim) if net.label_dim else None
        class_labels = self.class_labels(drawn if labels is None else labels, len(latents))

        def noise() -> Tensor:
            return streams.normal(shape, self.state_dtype, self.device)

        return self.integrate(latents, class_labels, noise, on_step).float()

    def draw_labels(self, seeds: Sequence[int]) -> Tensor | None:
        """The class indices [N] that the seeds themselves give, as in EDM's generator; None without classes."""
        net = self.networks.denoiser
        streams = SeedStreams(seeds)
        streams.normal((net.img_channels, net.img_resolution, net.img_resolution), torch.float32, torch.device("cpu"))
        return streams.labels(net.label_dim) if net.label_dim else None

    def class_labels(self, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
        """One-hot rows [count, label_dim] of class indices; None for an unconditional net.

        Raises:
            UserError: labels for an unconditional net, out of range or of another number.
        """
        return one_hot(labels, count, self.networks.denoiser.label_dim, self.device)

    @torch.no_grad()
    def integrate(
        self,
        latents: Tensor,
        class_labels: Tensor | None = None,
        noise: Callable[[], Tensor] | None = None,
        on_step: Callable[[Step, Tensor], None] | None = None,
    ) -> Tensor:
        """Run the solver from given latents.

        Args:
            latents: unit normal noise [B, C, H, W].
            class_labels: rows [B, label_dim] or None.
            noise: called once a step, gives unit normal noise [B, C, H, W]; needed with churn or boosting alone.
            on_step: called before each step with the step and the state.

        Returns:
            x [B, C, H, W] in `state_dtype`, in clean-image coordinates.

        Raises:
            UserError: x became NaN or infinite; step and sigma are named.
        """
        coords, batch = self.coordinates, len(latents)

        def time(value: float) -> Tensor:
            return torch.full((batch, 1, 1, 1), value, dtype=torch.float64, device=latents.device)

        log_ratio = torch.full((batch,), torch.inf, dtype=torch.float64, device=latents.device)
        first_bad = torch.full((), len(self.steps), device=latents.device)  # on the device: looking would wait for it
        previous: tuple[Tensor, Tensor] | None = None
        carried = CarriedGradient(self.guidance.dg_reuse) if self.guidance.dg_every > 1 else None
        t = time(self.steps[0].t)
        x = latents.to(self.state_dtype) * (coords.sigma(t) * coords.s(t)).to(self.state_dtype)
        for step in self.steps:
            if on_step is not None:
                on_step(step, x)
            t, t_next = time(step.t), time(step.t_next)
            t_hat, x_hat = self._churn(step, x, t, log_ratio, noise)
            arguments = (x_hat, t_hat, t_next, class_labels, *(previous or ()))
            x, denoised, log_ratio = self._step_function(step, arguments, carried)(*arguments)
            if self.sampling.solver == "dpmpp-2m":
                previous = denoised, t_hat
            bad = ~x.isfinite().all() & (first_bad == len(self.steps))
            first_bad = torch.where(bad, step.index, first_bad)
        failed = int(first_bad)
        if failed < len(self.steps):
            raise UserError(
                f"the images became NaN or infinite at step {failed} of {len(self.steps)}, "
                f"sigma {self.steps[failed].sigma:.4g}; lower the guidance weights or use --dtype float32"
            )
        return x

    def prepare(self, batch: int) -> None:
        """Build every function that the plan calls for batches of this size, so that sampling itself compiles none."""
        net = self.networks.denoiser
        shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
        x = torch.zeros(shape, dtype=self.state_dtype, device=self.device)
        labels = self.class_labels([0] * batch, batch) if net.label_dim else None
        sigma = torch.ones(batch, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for guidances in dict.fromkeys(g for step in self.steps for g in (step.predictor, step.corrector)):
                if guidances is not None:  # each function once, not once a step
                    keep = self.guidance.dg_every > 1
                    self._function(guidances, (x, sigma, labels), keep)(x, sigma, labels)
            if self._step_runtime is not None:
                self.integrate(x.float(), labels, lambda: torch.zeros_like(x))

    def _churn(
        self, step: Step, x: Tensor, t: Tensor, log_ratio: Tensor, noise: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Time and state after the step's churn; without churn in the whole run, those given."""
        if not (self.sampling.S_churn or self.guidance.boosting):
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

    def _step_function(
        self, step: Step, example: tuple[Tensor | None, ...], carried: CarriedGradient | None
    ) -> Function:
        """(x_hat, t_hat, t_next, class_labels, last denoised, last t) -> (x_next, denoised, log_ratio).

        The last two only for the second-order multistep solver, and not in its first step.
        """

        def advance(x_hat: Tensor, t_hat: Tensor, t_next: Tensor, labels: Tensor | None, *last: Tensor) -> Any:
            predict = self._denoise(step.predictor, labels, step.carried[0], carried)
            denoised, log_ratio = predict(x_hat, t_hat)
            if self.sampling.solver == "dpmpp-2m":
                x = dpmpp_2m_step(x_hat, denoised, t_hat, t_next, (last[0], last[1]) if last else None)
            elif step.corrector is None:
                x = euler_step(x_hat, denoised, t_hat, t_next, self.coordinates)
            else:
                correct = self._denoise(step.corrector, labels, step.carried[1], carried)
                x = heun_step(
                    x_hat, denoised, t_hat, t_next, lambda x, t: correct(x, t)[0], self.coordinates, self.sampling.alpha
                )
            return x.to(self.state_dtype), denoised, log_ratio

        if self._step_runtime is None or carried is not None:  # what is carried lives outside of any one step
            return advance
        key = ("step", step.predictor, step.corrector, tuple(None if a is None else a.shape for a in example))
        if key not in self._functions:
            self._functions[key] = self._step_runtime(advance, example)
        return self._functions[key]

    def _denoise(
        self,
        guidances: tuple[Guidance, ...],
        class_labels: Tensor | None,
        reusing: DiscriminatorGuidance | None = None,
        carried: CarriedGradient | None = None,
    ) -> Denoise:
        """(x, t) -> denoised images and log-ratio under the given guidances."""
        coords = self.coordinates

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            sigma = coords.sigma(t).flatten()
            arguments = (x / coords.s(t)).to(self.state_dtype), sigma, class_labels
            results = self._function(guidances, arguments, carried is not None)(*arguments)
            denoised, log_ratio, *gradient = results
            if carried is not None and gradient:
                carried.keep(sigma, gradient[0])
            if carried is not None and reusing is not None:
                weight = reusing.weight * reusing.inside(sigma)
                denoised = denoised + carried.correction(sigma, weight).to(denoised.dtype)
            return denoised, log_ratio

        return denoise

    def _function(
        self, guidances: tuple[Guidance, ...], example: tuple[Tensor, Tensor, Tensor | None], keep: bool = False
    ) -> Function:
        """The guided denoiser for these guidances in this sampler's runtime, built once a shape.

        Args:
            keep: return the discriminator's gradient too, where there is one.
        """
        key = (guidances, example[0].shape if self._runtime else None)
        if key not in self._functions:
            net = self.networks.denoiser
            function: Function = guided_denoiser(net, guidances)
            discriminator = next((g for g in guidances if isinstance(g, DiscriminatorGuidance)), None)
            if keep and discriminator is not None:
                others = [g for g in guidances if g is not discriminator]
                function = gradient_keeping_denoiser(net, others, discriminator)
            self._functions[key] = self._runtime(function, example) if self._runtime else function
        return self._functions[key]
