"""What runs at which point of which step: known on the host before the first network call.

So a compiled function has no branch, and a guidance outside of its window, or of weight 0, runs no network at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dgfast.config import VARIANCES, GuidanceConfig, SamplingConfig
from dgfast.denoiser import FlowPrecond
from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance, Guidance, of_velocities
from dgfast.guidance.declaration import guiding
from dgfast.guidance.weights import images, weights
from dgfast.networks import Networks, image_shape
from dgfast.noise_levels import Coordinates, posterior_log_variances, respaced_levels, sigma_grid
from dgfast.solvers import SOLVERS, FlowSolver, Solver

# DG's boosting (arXiv 2211.17091, published code): every 5th step churns, every 2nd doubles the guidance.
_BOOST_CHURN, _BOOST_CHURN_PERIOD = 4.0, 5
_BOOST_WEIGHT, _BOOST_WEIGHT_PERIOD = 2.0, 2
_FOR_FLOWS = ", ".join(
    [*(name for name, solver in SOLVERS.items() if issubclass(solver, FlowSolver)), "heun, euler or dpmpp-2m"]
)


@dataclass(frozen=True)
class Step:
    """One step of the plan. All of it is known before the first network call.

    Attributes:
        t, t_next: solver times; sigma: noise level at t; gamma: its relative rise by churn, and by boosting's churn.
        predictor, corrector: the guidances at the first and at the second point; corrector None: first order.
        log_variances: of the ancestral step, see `noise_levels.posterior_log_variances`.
        carried: the discriminator guidances, at the two points, whose gradient is carried over from an earlier call.
    """

    index: int
    t: float
    t_next: float
    sigma: float
    gamma: float
    boost_gamma: float | None
    predictor: tuple[Guidance, ...]
    corrector: tuple[Guidance, ...] | None
    log_variances: tuple[float, float] = (-math.inf, -math.inf)
    carried: tuple[DiscriminatorGuidance | None, DiscriminatorGuidance | None] = (None, None)

    @property
    def churns(self) -> bool:
        """Whether any sample's noise level may rise before it."""
        return self.gamma > 0 or self.boost_gamma is not None


def noise_grid(networks: Networks, config: SamplingConfig, sigma_min: float, sigma_max: float) -> Tensor:
    """The noise levels of `config`, highest first and without the final 0: [N].

    Raises:
        UserError: respacing for a network of continuous time, or a grid that does not exist.
    """
    if config.respacing is None:
        return sigma_grid(config, sigma_min, sigma_max)
    levels = getattr(networks.denoiser, "levels", None)
    if levels is None:
        raise UserError("--respacing is for networks with timesteps of their own; give this one --steps and --grid")
    return respaced_levels(config.respacing, levels)


def plan(
    networks: Networks, config: SamplingConfig, guidance: GuidanceConfig, own: Sequence[Guidance], sigmas: Tensor,
    coordinates: Coordinates,
) -> tuple[Step, ...]:  # fmt: skip
    """The steps through the noise levels `sigmas` [N], highest first and without the final 0.

    Args:
        own: guidances besides those of the configuration.

    Raises:
        UserError: a guidance whose network is missing or does not fit.
    """
    solver = SOLVERS[config.solver]
    if (solver.unit_start and guidance.boosting) or (solver.function == "posterior" and guidance.dg_every > 1):
        raise UserError(f"boosting does not go with {config.solver}, nor dg_every above 1 with ddpm")
    if solver.unit_start and hasattr(networks.denoiser, "path"):
        raise UserError(
            f"{config.solver} draws in discrete time, this network was trained by flow matching: use {_FOR_FLOWS}"
        )
    net = networks.denoiser
    levels = net.round_sigma(sigmas).cpu()
    times = [*coordinates.sigma_inv(levels).tolist(), 0.0]
    predictors, correctors = all_guidances(networks, guidance, own, [*levels.tolist(), 0.0], sigmas.device)
    _require_meaning(predictors, solver)
    doubled = boosted(predictors)
    variances = _log_variances(networks, config, levels)
    steps = []
    for i, (sigma, t, t_next) in enumerate(zip(levels.tolist(), times[:-1], times[1:], strict=True)):
        gamma, boost_gamma = config.gamma(sigma), None
        if guidance.boosting and i % _BOOST_CHURN_PERIOD == 0:
            boost_gamma = replace(config, S_churn=_BOOST_CHURN).gamma(sigma)
        highest = torch.tensor([sigma * (1 + max(gamma, boost_gamma or 0.0))], dtype=torch.float64)
        raised = float(net.round_sigma(highest.to(sigmas.device)))
        usual = doubled if guidance.boosting and i % _BOOST_WEIGHT_PERIOD == 0 else predictors
        corrector = None
        if solver.points == 2 and i < len(sigmas) - 1:
            t_prime = torch.tensor([t + config.alpha * (t_next - t)], dtype=torch.float64)
            # Churn moves the second point between t_hat and t_next; only alpha < 1 makes it depend on t_hat.
            low = float(coordinates.sigma(t_prime))
            corrector = _active(correctors, low, low if config.alpha == 1 else raised)
        steps.append(
            Step(i, t, t_next, sigma, gamma, boost_gamma, _active(usual, sigma, raised), corrector, variances[i])
        )
    return _with_reuse(steps, guidance.dg_every)


def flow_plan(
    networks: Networks, config: SamplingConfig, guidance: GuidanceConfig, own: Sequence[Guidance],
    times: Sequence[float], path: Coordinates, device: torch.device,
) -> tuple[Step, ...]:  # fmt: skip
    """The steps through the times of a path, the last one's end included; `own` as in `plan`. device: where to sample.

    Raises:
        UserError: a guidance whose network is missing or does not fit.
    """
    if guidance.boosting or guidance.dg_every > 1:
        raise UserError(f"boosting and dg_every above 1 do not go with {config.solver}")
    solver = SOLVERS[config.solver]
    sigmas = path.sigma(torch.tensor(times, dtype=torch.float64)).tolist()
    predictors, correctors = all_guidances(networks, guidance, own, sigmas, device, solver.function)
    _require_meaning(predictors, solver)
    calls = solver.evaluations(len(times) - 1)
    steps = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        corrector = _seeing(correctors, sigmas[i + 1]) if solver.points == 2 and 2 * i + 1 < calls else None
        steps.append(Step(i, t, t_next, sigmas[i], 0.0, None, _seeing(predictors, sigmas[i]), corrector))
    return tuple(steps)


def _seeing(guidances: list[Guidance], sigma: float) -> tuple[Guidance, ...]:
    """Those that act there; at infinite noise and at none these are few, see `guidance.velocity`."""
    return tuple(g for g in _active(guidances, sigma, sigma) if g.mixes_velocities or 0 < sigma < math.inf)


def class_count(networks: Networks, guidance: GuidanceConfig) -> int:
    """Number of classes among which a label chooses: the score network's, or those of the classifier that guides it."""
    return networks.denoiser.label_dim or max(
        (kind.classes(networks, guidance) for kind in guiding(guidance)), default=0
    )


def _log_variances(networks: Networks, config: SamplingConfig, levels: Tensor) -> list[tuple[float, float]]:
    """Logarithms of the ancestral steps' least and most variance; the same one twice where the network learns none."""
    if SOLVERS[config.solver].function == "posterior" and not bool((levels.diff() < 0).all()):
        raise UserError("two of the steps round to one noise level of the network: use --respacing, or fewer --steps")
    bounds = posterior_log_variances(levels)
    if getattr(networks.denoiser, "learn_sigma", False):
        return [(float(least), float(most)) for least, most in bounds]
    # The last step adds no noise, its variance counts in the mean's shift alone: the posterior's, or the clipped one.
    last = (-torch.inf if config.fixed_variance == "small" else float(bounds[-1, 0]),)
    return [(fixed, fixed) for fixed in (*bounds[:-1, VARIANCES.index(config.fixed_variance)].tolist(), *last)]


def all_guidances(
    networks: Networks,
    config: GuidanceConfig,
    own: Sequence[Guidance],
    levels: Sequence[float],
    device: torch.device,
    function: str = "denoiser",
) -> tuple[list[Guidance], list[Guidance]]:
    """The guidances at the solver's first and at its second point, on a plan of these noise levels, 0 last.

    Args:
        own: guidances besides those of the configuration. function: what the solver calls.
        device: where to sample.

    Raises:
        UserError: a guidance whose network is missing, or which does not fit the images.
    """
    shape = image_shape(networks.denoiser)
    own = [guidance.fitted(shape, device) for guidance in own]
    first: list[Guidance] = []
    second: list[Guidance] = []
    for kind in guiding(config):
        guidance = kind.make(networks, config).fitted(shape, device)
        first += [guidance] if kind.on(config) else []
        second += [guidance.at_second_point(config)] if kind.on(config, second=True) else []
    first, second = [*first, *own], [*second, *(guidance.at_second_point(config) for guidance in own)]
    if function == "velocity":
        net = networks.denoiser
        assert isinstance(net, FlowPrecond), "the job has looked"
        first, second = ([of_velocities(g, net) for g in guidances] for guidances in (first, second))
    return [g.along(levels) for g in first], [g.along(levels, second=True) for g in second]


def _require_meaning(guidances: Sequence[Guidance], solver: type[Solver]) -> None:
    """
    Raises:
        UserError: a guidance that goes from step to step, and steps that are not of its kind; or two that remember.
    """
    needing = [guidance.needs_plain_steps for guidance in guidances if guidance.needs_plain_steps]
    if needing and not solver.plain_steps:
        plain = ", ".join(name for name, one in SOLVERS.items() if one.plain_steps)
        raise UserError(f"{needing[0]} has no meaning for {solver.name}: take one of {plain}")
    if sum(guidance.remembers for guidance in guidances) > 1:
        raise UserError("two guidances remember their last calls: a sampler keeps one memory")


def require_exportable(guidances: Sequence[Guidance], what: str, points: int) -> None:
    """
    Raises:
        UserError: no file can hold the function `what`, of a solver of so many points, under these guidances.
    """
    inputs = [name for guidance in guidances for name in (*weights([guidance]), *images([guidance]))]
    twice = next((name for name in inputs if inputs.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two guidances have the input {twice}: an exported file has it once, leave one of them out")
    for guidance in guidances:
        if guidance.remembers:
            raise UserError(f"{guidance.needs_plain_steps} goes from call to call: no exported file remembers it")
        if guidance.levels and what != "step" and points == 2:
            raise UserError(
                f"{guidance.name} goes by the steps of the plan, at both points of each: export --what step, "
                "or take a solver of one point, such as euler"
            )


def boosted(guidances: list[Guidance]) -> list[Guidance]:
    """The same guidances with boosting's doubled weight on the discriminator's."""
    return [replace(g, boost=_BOOST_WEIGHT) if isinstance(g, DiscriminatorGuidance) else g for g in guidances]


def _with_reuse(steps: list[Step], every: int) -> tuple[Step, ...]:
    """The plan with the discriminator left out of all but every so many of the calls that it guides."""
    planned, guided = [], 0
    for step in steps:
        calls, carried = [], []
        for guidances in (step.predictor, step.corrector):
            discriminator = next((g for g in guidances or () if isinstance(g, DiscriminatorGuidance)), None)
            left_out = discriminator is not None and guided % every > 0
            guided += discriminator is not None
            calls.append(tuple(g for g in guidances or () if not (left_out and g is discriminator)))
            carried.append(discriminator if left_out else None)
        corrector = None if step.corrector is None else calls[1]
        planned.append(replace(step, predictor=calls[0], corrector=corrector, carried=(carried[0], carried[1])))
    return tuple(planned)


def _active(guidances: list[Guidance], sigma_low: float, sigma_high: float) -> tuple[Guidance, ...]:
    return tuple(guidance for guidance in guidances if guidance.active(sigma_low, sigma_high))
