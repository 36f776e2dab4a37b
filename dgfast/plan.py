"""What runs at which point of which step: known on the host before the first network call.

So a compiled function has no branch, and a guidance outside of its window, or of weight 0, runs no network at all.
"""

import inspect
import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgfast.config import VARIANCES, GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
    WeightSchedule,
)
from dgfast.guidance.classifier import NoisyClassifier as Classifier
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.noise_levels import Coordinates, posterior_log_variances, respaced_levels, sigma_grid

# DG's boosting (arXiv 2211.17091, published code): every 5th step churns, every 2nd doubles the guidance.
_BOOST_CHURN, _BOOST_CHURN_PERIOD = 4.0, 5
_BOOST_WEIGHT, _BOOST_WEIGHT_PERIOD = 2.0, 2

T = TypeVar("T")


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
    networks: Networks, config: SamplingConfig, guidance: GuidanceConfig, sigmas: Tensor, coordinates: Coordinates
) -> tuple[Step, ...]:
    """The steps through the noise levels `sigmas` [N], highest first and without the final 0.

    Raises:
        UserError: a guidance whose network is missing or does not fit.
    """
    if config.solver in ("ddpm", "ddim") and (guidance.boosting or (config.solver == "ddpm" and guidance.dg_every > 1)):
        raise UserError(f"boosting does not go with {config.solver}, nor dg_every above 1 with ddpm")
    net = networks.denoiser
    levels = net.round_sigma(sigmas).cpu()
    times = [*coordinates.sigma_inv(levels).tolist(), 0.0]
    predictors, boosted, correctors = all_guidances(networks, guidance)
    variances = _log_variances(networks, config, levels)
    steps = []
    for i, (sigma, t, t_next) in enumerate(zip(levels.tolist(), times[:-1], times[1:], strict=True)):
        gamma, boost_gamma = config.gamma(sigma), None
        if guidance.boosting and i % _BOOST_CHURN_PERIOD == 0:
            boost_gamma = replace(config, S_churn=_BOOST_CHURN).gamma(sigma)
        highest = torch.tensor([sigma * (1 + max(gamma, boost_gamma or 0.0))], dtype=torch.float64)
        raised = float(net.round_sigma(highest.to(sigmas.device)))
        usual = boosted if guidance.boosting and i % _BOOST_WEIGHT_PERIOD == 0 else predictors
        corrector = None
        if config.solver == "heun" and i < len(sigmas) - 1:
            t_prime = torch.tensor([t + config.alpha * (t_next - t)], dtype=torch.float64)
            # Churn moves the second point between t_hat and t_next; only alpha < 1 makes it depend on t_hat.
            low = float(coordinates.sigma(t_prime))
            corrector = _active(correctors, low, low if config.alpha == 1 else raised)
        steps.append(
            Step(i, t, t_next, sigma, gamma, boost_gamma, _active(usual, sigma, raised), corrector, variances[i])
        )
    return _with_reuse(steps, guidance.dg_every)


def class_count(networks: Networks, guidance: GuidanceConfig) -> int:
    """Number of classes among which a label chooses: the score network's, or those of the classifier that guides it."""
    rare = (guidance.diversity and guidance.target_class is None) or (guidance.fidelity and guidance.base_class is None)
    if networks.denoiser.label_dim or not (guidance.classifier_scale or rare):
        return networks.denoiser.label_dim
    return _classes(networks.classifier)


def _classes(classifier: object) -> int:
    """The classes of one of dgfast's classifiers; 0, for not known, of any other function."""
    return classifier.encoder.out_channels if isinstance(classifier, NoisyClassifier) else 0


def _log_variances(networks: Networks, config: SamplingConfig, levels: Tensor) -> list[tuple[float, float]]:
    """Logarithms of the ancestral steps' least and most variance; the same one twice where the network learns none."""
    if config.solver == "ddpm" and not bool((levels.diff() < 0).all()):
        raise UserError("two of the steps round to one noise level of the network: use --respacing, or fewer --steps")
    bounds = posterior_log_variances(levels)
    if getattr(networks.denoiser, "learn_sigma", False):
        return [(float(least), float(most)) for least, most in bounds]
    # The last step adds no noise, its variance counts in the mean's shift alone: the posterior's, or the clipped one.
    last = (-torch.inf if config.fixed_variance == "small" else float(bounds[-1, 0]),)
    return [(fixed, fixed) for fixed in (*bounds[:-1, VARIANCES.index(config.fixed_variance)].tolist(), *last)]


def all_guidances(nets: Networks, wanted: GuidanceConfig) -> tuple[list[Guidance], list[Guidance], list[Guidance]]:
    """The guidances at the first point, the same with boosting's doubled weight, and those at the second point."""
    shared: list[Guidance] = []
    if wanted.classifier_scale:
        classifier = _classifier(nets, "classifier guidance")
        schedule = WeightSchedule(wanted.classifier_schedule)
        shared.append(ClassifierGuidance(classifier, wanted.classifier_scale, nets.time, schedule))
    if wanted.classifier_free:
        shared.append(_classifier_free(nets, wanted))
    if wanted.classifier_free and getattr(nets.denoiser, "null_class", 0) is None:
        raise UserError("classifier-free guidance needs a score network that was trained without labels too")
    if wanted.autoguidance != 1:
        reference = _needed(nets.reference, "autoguidance", "reference")
        shared.append(Autoguidance(reference, wanted.autoguidance))
    if wanted.classifier_free and not nets.denoiser.label_dim:
        raise UserError("classifier-free guidance needs a conditional score network")
    shared += _low_density(nets, wanted)

    def discriminator(weight: float, boost: float = 1.0) -> list[Guidance]:
        if not weight:
            return []
        net = _needed(nets.discriminator, "discriminator guidance", "discriminator")
        window, published, schedule = wanted.dg_window, wanted.published_window, WeightSchedule(wanted.dg_schedule)
        return [DiscriminatorGuidance(net, weight, window, nets.time, published, boost, schedule)]

    return (
        shared + discriminator(wanted.dg_weight),
        shared + discriminator(wanted.dg_weight, _BOOST_WEIGHT),
        shared + discriminator(wanted.dg_weight_2nd),
    )


def _classifier_free(nets: Networks, wanted: GuidanceConfig) -> ClassifierFreeGuidance:
    channels, there = wanted.cfg_channels, nets.denoiser.img_channels
    if channels is not None and channels > there:
        raise UserError(f"--cfg-channels {channels}: this network's images have {there}")
    return ClassifierFreeGuidance(
        nets.denoiser, wanted.cfg_scale, wanted.guidance_interval, wanted.cfg_scale_low, wanted.cfg_branch, channels
    )


def _low_density(nets: Networks, wanted: GuidanceConfig) -> list[Guidance]:
    """The two terms of low-density guidance: in the noisy image, and in the predicted clean one."""
    found: list[Guidance] = []
    if wanted.diversity:
        a = -wanted.diversity if wanted.perceptual else wanted.diversity
        classifier = _classifier(nets, "low-density guidance", "target class", wanted.target_class)
        found.append(LowDensityGuidance(classifier, a, wanted.normalize, wanted.target_class, nets.time))
    if wanted.fidelity:
        how, label = wanted.normalize, wanted.base_class
        classifier = _classifier(nets, "guidance toward the predicted clean image", "base class", label)
        found.append(
            PredictedCleanGuidance(classifier, wanted.fidelity, how, label, wanted.clean_time == "t", nets.time)
        )
    return found


def _classifier(nets: Networks, guidance: str, role: str = "", label: int | None = None) -> Classifier:
    """The classifier, if it is noise-aware and knows the class `label`, or for None those that labels choose among."""
    classifier = _needed(nets.classifier, guidance, "classifier")
    try:
        inspect.signature(classifier.forward if isinstance(classifier, nn.Module) else classifier).bind(None, None)
    except TypeError:
        raise UserError(
            f"{guidance} needs a noise-aware classifier, (u, t) -> logits; this one takes no time"
        ) from None
    own, classes = nets.denoiser.label_dim, _classes(classifier)
    if label is None and not (own or classes):
        either = f", a {role}," if role else ""
        raise UserError(f"{guidance} needs a conditional score network{either} or a classifier that says its classes")
    if label is None and own and classes not in (0, own):
        raise UserError(
            f"the classifier knows {classes} classes, the score network {own}: no classifier guidance between them"
        )
    known = classes or own
    if label is not None and known and label >= known:
        raise UserError(f"{role} {label} is out of range; the classifier knows classes 0 to {known - 1}")
    return classifier


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


def _needed(network: T | None, guidance: str, role: str) -> T:
    if network is None:
        raise UserError(f"{guidance} needs a {role} network, which this bundle does not have")
    return network
