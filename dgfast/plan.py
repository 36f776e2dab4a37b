"""What runs at which point of which step: known on the host before the first network call.

So a compiled function has no branch, and a guidance outside of its window, or of weight 0, runs no network at all.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiscriminatorGuidance,
    Guidance,
)
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
    predictors, boosted, correctors = all_guidances(networks, guidance)
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


def all_guidances(nets: Networks, wanted: GuidanceConfig) -> tuple[list[Guidance], list[Guidance], list[Guidance]]:
    """The guidances at the first point, the same with boosting's doubled weight, and those at the second point."""
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
