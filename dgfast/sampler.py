"""Noise levels + guided denoiser + solver + runtime = a sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    GuidedDenoiser,
    guided_denoiser,
)
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.noise_levels import coordinates, sigma_bounds, sigma_grid
from dgfast.randomness import SeedStreams
from dgfast.solvers import churn, dpmpp_2m_step, euler_step, heun_step

# DG's boosting (arXiv 2211.17091, published code): every 5th step churns, every 2nd doubles the guidance.
_BOOST_CHURN, _BOOST_CHURN_PERIOD = 4.0, 5
_BOOST_WEIGHT, _BOOST_WEIGHT_PERIOD = 2.0, 2

Runtime = Callable[[GuidedDenoiser, tuple[Tensor, Tensor, Tensor | None]], GuidedDenoiser]
SlopeFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One step of the plan. All of it is known before the first network call.

    Attributes:
        t, t_next: solver times; sigma: noise level at t; gamma: its relative rise by churn, and by boosting's churn.
        predictor, corrector: the guidances at the first and at the second point; corrector None: first order.
    """

    index: int
    t: float
    t_next: float
    sigma: float
    gamma: float
    boost_gamma: float | None
    predictor: tuple[Guidance, ...]
    corrector: tuple[Guidance, ...] | None


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
    ) -> None:
        """
        Args:
            device: where to sample; None: where the denoiser's weights are.
            runtime: makes a faster callable of the guided denoiser for one shape, such as `runtimes.compiled.build`;
                None runs it as it is.
            state_dtype: type of the solver's state; float64 as EDM's.

        Raises:
            UserError: a guidance whose network is missing, or a grid that does not exist.
        """
        self.networks, self.sampling, self.guidance = networks, sampling, guidance
        net = networks.denoiser
        weights = net.parameters() if isinstance(net, nn.Module) else iter(())
        at = next((parameter.device for parameter in weights), torch.device("cpu"))
        self.device, self.state_dtype = at if device is None else torch.device(device), state_dtype
        self._runtime = runtime
        self._functions: dict[tuple[object, ...], GuidedDenoiser] = {}
        low, high = sigma_bounds(sampling, net.sigma_min, net.sigma_max)
        self.coordinates = coordinates(sampling, low, high)
        self.steps = self._plan(sigma_grid(sampling, low, high))
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
        classes = self.networks.denoiser.label_dim
        if labels is None:
            return None
        if not classes:
            raise UserError("this score network is unconditional; leave the labels out")
        indices = torch.as_tensor(labels, device=self.device)
        if indices.is_floating_point():
            raise UserError("labels are class indices: whole numbers")
        indices = indices.long()
        if indices.shape != (count,):
            raise UserError(f"{indices.numel()} labels for {count} images; give one label an image")
        wrong = indices[(indices < 0) | (indices >= classes)]
        if len(wrong):
            raise UserError(f"label {int(wrong[0])} is out of range; this network knows classes 0 to {classes - 1}")
        return F.one_hot(indices, classes).float()

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
        t = time(self.steps[0].t)
        x = latents.to(self.state_dtype) * (coords.sigma(t) * coords.s(t)).to(self.state_dtype)
        for step in self.steps:
            if on_step is not None:
                on_step(step, x)
            t, t_next = time(step.t), time(step.t_next)
            t_hat, x = self._churn(step, x, t, log_ratio, noise)
            x_hat = x
            predict = self._slope(step.predictor, class_labels)
            d, denoised, log_ratio = predict(x_hat, t_hat)
            if self.sampling.solver == "dpmpp-2m":
                x = dpmpp_2m_step(x_hat, denoised, t_hat, t_next, previous)
                previous = denoised, t_hat
            elif step.corrector is None:
                x = euler_step(x_hat, d, t_hat, t_next)
            else:
                evaluate = self._slope(step.corrector, class_labels)

                def correct(x: Tensor, t: Tensor, evaluate: SlopeFunction = evaluate) -> Tensor:
                    return evaluate(x, t)[0]

                x = heun_step(x_hat, d, t_hat, t_next, correct, self.sampling.alpha)
            x = x.to(self.state_dtype)
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
        x = torch.zeros(
            batch, net.img_channels, net.img_resolution, net.img_resolution, dtype=self.state_dtype, device=self.device
        )
        labels = self.class_labels([0] * batch, batch) if net.label_dim else None
        sigma = torch.ones(batch, dtype=torch.float64, device=self.device)
        calls = (guidances for step in self.steps for guidances in (step.predictor, step.corrector))
        for guidances in dict.fromkeys(calls):  # each function once, not once a step
            if guidances is not None:
                with torch.no_grad():
                    self._function(guidances, (x, sigma, labels))(x, sigma, labels)

    def _plan(self, sigmas: Tensor) -> tuple[Step, ...]:
        net, config = self.networks.denoiser, self.sampling
        levels = net.round_sigma(sigmas.to(self.device)).cpu()
        times = [*self.coordinates.sigma_inv(levels).tolist(), 0.0]
        predictors, boosted, correctors = self._guidances()
        steps = []
        for i, (sigma, t, t_next) in enumerate(zip(levels.tolist(), times[:-1], times[1:], strict=True)):
            gamma, boost_gamma = config.gamma(sigma), None
            if self.guidance.boosting and i % _BOOST_CHURN_PERIOD == 0:
                boost_gamma = replace(config, S_churn=_BOOST_CHURN).gamma(sigma)
            highest = torch.tensor([sigma * (1 + max(gamma, boost_gamma or 0.0))], dtype=torch.float64)
            raised = float(net.round_sigma(highest.to(self.device)))
            usual = boosted if self.guidance.boosting and i % _BOOST_WEIGHT_PERIOD == 0 else predictors
            corrector = None
            if config.solver == "heun" and i < len(sigmas) - 1:
                t_prime = torch.tensor([t + config.alpha * (t_next - t)], dtype=torch.float64)
                # Churn moves the second point between t_hat and t_next; only alpha < 1 makes it depend on t_hat.
                low = float(self.coordinates.sigma(t_prime))
                corrector = _active(correctors, low, low if config.alpha == 1 else raised)
            steps.append(Step(i, t, t_next, sigma, gamma, boost_gamma, _active(usual, sigma, raised), corrector))
        return tuple(steps)

    def _guidances(self) -> tuple[list[Guidance], list[Guidance], list[Guidance]]:
        """The guidances at the first point, the same with boosting's doubled weight, and those at the second point."""
        nets, wanted = self.networks, self.guidance
        shared: list[Guidance] = []
        if wanted.classifier_scale:
            classifier = _needed(nets.classifier, "classifier guidance", "classifier")
            classes = classifier.encoder.out_channels if isinstance(classifier, NoisyClassifier) else None
            if classes not in (None, nets.denoiser.label_dim):
                raise UserError(
                    f"the classifier knows {classes} classes, the score network {nets.denoiser.label_dim}: "
                    "no classifier guidance between them"
                )
            shared.append(ClassifierGuidance(classifier, wanted.classifier_scale, nets.time))
        if wanted.cfg_scale != 1:
            shared.append(ClassifierFreeGuidance(nets.denoiser, wanted.cfg_scale, wanted.guidance_interval))
        if wanted.autoguidance != 1:
            reference = _needed(nets.reference, "autoguidance", "reference")
            shared.append(Autoguidance(reference, wanted.autoguidance))
        if (wanted.classifier_scale or wanted.cfg_scale != 1) and not nets.denoiser.label_dim:
            raise UserError("classifier and classifier-free guidance need a conditional score network")

        def discriminator(weight: float, boost: float = 1.0) -> list[Guidance]:
            if not weight:
                return []
            net = _needed(nets.discriminator, "discriminator guidance", "discriminator")
            window, published = wanted.dg_window, wanted.published_window
            return [DiscriminatorGuidance(net, weight, window, nets.time, published, boost)]

        return (
            shared + discriminator(wanted.dg_weight),
            shared + discriminator(wanted.dg_weight, _BOOST_WEIGHT),
            shared + discriminator(wanted.dg_weight_2nd),
        )

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

    def _slope(self, guidances: tuple[Guidance, ...], class_labels: Tensor | None) -> SlopeFunction:
        """(x, t) -> dx/dt, denoised image and log-ratio under the given guidances."""
        coords = self.coordinates

        def slope(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            arguments = (x / coords.s(t)).to(self.state_dtype), coords.sigma(t).flatten(), class_labels
            denoised, log_ratio = self._function(guidances, arguments)(*arguments)
            return coords.slope(x, denoised, t), denoised, log_ratio

        return slope

    def _function(
        self, guidances: tuple[Guidance, ...], example: tuple[Tensor, Tensor, Tensor | None]
    ) -> GuidedDenoiser:
        """The guided denoiser for these guidances in this sampler's runtime, built once a shape."""
        key = (guidances, example[0].shape if self._runtime else None)
        if key not in self._functions:
            function = guided_denoiser(self.networks.denoiser, guidances)
            self._functions[key] = self._runtime(function, example) if self._runtime else function
        return self._functions[key]


def _active(guidances: list[Guidance], sigma_low: float, sigma_high: float) -> tuple[Guidance, ...]:
    return tuple(guidance for guidance in guidances if guidance.active(sigma_low, sigma_high))


def _needed(network: T | None, guidance: str, role: str) -> T:
    if network is None:
        raise UserError(f"{guidance} needs a {role} network, which this bundle does not have")
    return network
