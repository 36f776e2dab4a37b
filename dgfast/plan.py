"""What runs at which point of which step: known on the host before the first network call.

So a compiled function has no branch, and a guidance outside of its window, or of weight 0, runs no network at all.
"""

import inspect
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
    LowDensityGuidance,
    PredictedCleanGuidance,
)
from dgfast.guidance.classifier import NoisyClassifier as Classifier
from dgfast.nets.discriminator import NoisyClassifier
from dgfast.networks import Networks
from dgfast.noise_levels import Coordinates

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
    carried: tuple[DiscriminatorGuidance | None, DiscriminatorGuidance | None] = (None, None)


def plan(
    networks: Networks, config: SamplingConfig, guidance: GuidanceConfig, sigmas: Tensor, coordinates: Coordinates
) -> tuple[Step, ...]:
    """The steps through the noise levels `sigmas` [N], highest first and without the final 0.

    Raises:
        UserError: a guidance whose network is missing or does not fit.
    """
    net = networks.denoiser
    levels = net.round_sigma(sigmas).cpu()
    times = [*coordinates.sigma_inv(levels).tolist(), 0.0]
    predictors, boosted, correctors = _guidances(networks, guidance)
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
        steps.append(Step(i, t, t_next, sigma, gamma, boost_gamma, _active(usual, sigma, raised), corrector))
    return _with_reuse(steps, guidance.dg_every)


def _guidances(nets: Networks, wanted: GuidanceConfig) -> tuple[list[Guidance], list[Guidance], list[Guidance]]:
    """The guidances at the first point, the same with boosting's doubled weight, and those at the second point."""
    shared: list[Guidance] = []
    if wanted.classifier_scale:
        classifier = _classifier(nets, "classifier guidance")
        shared.append(ClassifierGuidance(classifier, wanted.classifier_scale, nets.time))
    if wanted.cfg_scale != 1:
        shared.append(ClassifierFreeGuidance(nets.denoiser, wanted.cfg_scale, wanted.guidance_interval))
    if wanted.autoguidance != 1:
        reference = _needed(nets.reference, "autoguidance", "reference")
        shared.append(Autoguidance(reference, wanted.autoguidance))
    if wanted.cfg_scale != 1 and not nets.denoiser.label_dim:
        raise UserError("classifier-free guidance needs a conditional score network")

    shared += _low_density(nets, wanted)

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
    """The classifier, if it is noise-aware and knows the class `label`, or for None those of the score network."""
    classifier = _needed(nets.classifier, guidance, "classifier")
    try:
        inspect.signature(classifier.forward if isinstance(classifier, nn.Module) else classifier).bind(None, None)
    except TypeError:
        raise UserError(
            f"{guidance} needs a noise-aware classifier, (u, t) -> logits; this one takes no time"
        ) from None
    own = nets.denoiser.label_dim
    classes = classifier.encoder.out_channels if isinstance(classifier, NoisyClassifier) else own
    if label is None and not own:
        raise UserError(f"{guidance} needs a conditional score network" + (f", or a {role}" if role else ""))
    if label is None and classes != own:
        raise UserError(
            f"the classifier knows {classes} classes, the score network {own}: no classifier guidance between them"
        )
    if label is not None and not 0 <= label < classes:
        raise UserError(f"{role} {label} is out of range; the classifier knows classes 0 to {classes - 1}")
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
